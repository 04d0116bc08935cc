"""Staleness counts trained iterations: a learner that goes back makes what is stored no older."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmdflow.metrics.claim import staleness_of
from pmdflow.store import Conflict, TrajectoryStore
from pmdflow.store.archive import read_part, write_part
from tests.support.filled_store import admit, assert_exact, complete, quota, ready_store
from tests.support.resumed_loop import ResumedLoop


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 16), crashes=st.sets(st.integers(1, 24), max_size=8))
def test_no_rollout_ages_by_what_is_trained_again(seed: int, crashes: set[int]) -> None:
    loop = ResumedLoop(seed=seed, lookahead=2, max_staleness=4, every=5)
    for number in range(25):
        if number in crashes:
            loop.crash()
        loop.iterate()
    ledger = assert_exact(loop.store)
    assert (ledger["evicted_over_age"], ledger["masked_over_age"]) == (0, 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 16), crashes=st.sets(st.integers(1, 16), max_size=6), limit=st.integers(0, 2))
def test_the_limit_is_strict_and_exact(seed: int, crashes: set[int], limit: int) -> None:
    loop = ResumedLoop(seed=seed, lookahead=2, max_staleness=limit, every=3)
    for number in range(16):
        if number in crashes:
            loop.crash()
        loop.iterate()
    assert_exact(loop.store)


def test_what_was_restored_survives_a_reopening_and_is_archived(tmp_path: Path) -> None:
    loop = ResumedLoop(tmp_path / "store", seed=3, lookahead=2, max_staleness=4, every=3)
    for number in range(8):
        if number == 5:
            loop.crash()
        loop.iterate()
    claim = loop.store.read_claim(loop.iteration)
    assert claim.restored == {6: 3}
    loop.store.close()
    with TrajectoryStore.read(tmp_path / "store") as store:
        assert store.read_claim(loop.iteration).restored == store.read_rows(loop.iteration).restored == {6: 3}
    again = read_part(write_part(tmp_path, claim, attrs={}))
    versions = np.arange(9, dtype=np.int32)
    np.testing.assert_array_equal(staleness_of(again, versions), staleness_of(claim, versions))


def test_only_an_older_version_is_restored_under_a_newer_number() -> None:
    store = ready_store()
    store.publish(1)
    store.set_quota(quota(1))
    for version, weights_of in ((1, 0), (2, 2), (2, -1)):
        with pytest.raises(Conflict):
            store.restore(version, weights_of=weights_of)
    store.restore(2, weights_of=0)
    store.restore(2, weights_of=0)
    with pytest.raises(Conflict):
        store.restore(2, weights_of=1)
    store.set_quota(quota(2))
    admit(store)
    complete(store, version=1)
    assert store.claim(1, 2, 0.0).status == "claimed"
    assert staleness_of(store.read_claim(1), np.array([1, 0], np.int32)).tolist() == [0, 0]
