"""A claim in two parts: rows and segments without a file read, and the tokens of the trajectories asked for."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from pmdflow.store import Conflict, TrajectoryStore, encode_segments
from pmdflow.types import Claim, ClaimTokens, Mask, TrainBatch
from tests.support.filled_store import admit, lease_all, open_store, quota, ready_store, score_all, segment
from tests.support.fixture_run import make_batch


def claimed(path: Path | None = None) -> TrajectoryStore:
    """Two groups of two in a claim: observed tokens, two versions of which the first is over-age, two temperatures."""
    store = ready_store(path, groups_per_iteration=2, max_staleness=0)
    for number in range(2):
        admit(store, number, max_tokens=40)
    leases = lease_all(store)
    for lease in leases[:3]:
        store.append([segment(lease, 3), segment(lease, 2, offset=3)])
    store.append([replace(segment(leases[0], 2, offset=5), observed=True)])
    store.append([replace(segment(leases[1], 2, offset=5, stop="stop"), temperature=0.5)])
    store.publish(1)
    store.set_quota(quota(1))
    for lease, offset in zip((leases[0], leases[2], leases[3]), (7, 5, 0), strict=True):
        store.append([segment(lease, 4, offset=offset, version=1, stop="stop")])
    score_all(store)
    assert store.claim(1, 1, 0.0).status == "claimed"
    return store


def assert_same(found: TrainBatch, expected: TrainBatch) -> None:
    """All but components and plan, which a part of a claim has not."""
    for field in fields(TrainBatch):
        if field.name not in ("components", "plan"):
            one, other = getattr(found, field.name), getattr(expected, field.name)
            np.testing.assert_array_equal(one, other, err_msg=field.name, strict=isinstance(one, np.ndarray))


def test_rows_and_tokens_are_the_packed_claim() -> None:
    store = claimed()
    whole, claim = store.read_claim(1), store.read_rows(1)
    every = np.arange(len(claim.rewards))
    assert_same(claim.batch(every, store.read_tokens(claim.trajectories)), whole)
    assert claim.components.keys() == whole.components.keys()
    assert claim.segment_lengths.tolist() == [3, 5, 2, 4, 3, 5, 2, 3, 5, 4, 3, 4], "neighbours of one kind are one"
    for flags in (Mask.GENERATED, Mask.TRAINED, Mask.OVER_AGE):
        assert claim.count(flags).tolist() == whole.count(flags).tolist()
    assert whole.count(Mask.OVER_AGE).tolist() == [5, 7, 5, 0]


def test_some_trajectories_in_any_order() -> None:
    store = claimed()
    whole, claim = store.read_claim(1), store.read_rows(1)
    rows = np.array([3, 0, 2])
    tokens = store.read_tokens(claim.trajectories[rows])
    expected = whole.read(rows)
    np.testing.assert_array_equal(tokens.tokens, expected.tokens)
    np.testing.assert_array_equal(tokens.logprobs, expected.logprobs)
    batch = claim.batch(rows, tokens)
    for place, row in enumerate(rows):
        own, there = (slice(*b.cu_seqlens[i : i + 2]) for b, i in ((batch, place), (whole, row)))
        for name in ("tokens", "logprobs", "versions", "temperatures", "mask"):
            np.testing.assert_array_equal(getattr(batch, name)[own], getattr(whole, name)[there])
    assert len(store.read_tokens([]).tokens) == 0


def test_what_the_learner_left_out_is_in_the_masks_of_rows() -> None:
    store = claimed()
    first = int(store.read_rows(1).trajectories[0])
    store.publish(2, 1, {"veto": [first]})
    assert store.read_rows(1).count(Mask.VETO).tolist() == [4, 0, 0, 0]


def test_tokens_need_no_claim_but_trajectories_that_are_there(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.publish(0)
        store.set_quota(quota())
        admit(store)
        (lease, other) = lease_all(store)
        store.append([segment(lease, 3)])
        assert store.read_tokens([lease.trajectory]).tokens.tolist() == [5, 6, 7, 0, 1, 2]
        assert store.read_tokens([other.trajectory]).logprobs.tolist() == [0.0] * 3
        room = ClaimTokens(tokens=np.full(9, -1, np.int32), logprobs=np.zeros(9, np.float32))
        found = store.read_tokens([lease.trajectory], out=room)
        assert found.tokens.base is not None and room.tokens.tolist() == [5, 6, 7, 0, 1, 2, -1, -1, -1]
        with pytest.raises(Conflict, match="make it longer"):
            store.read_tokens([lease.trajectory, other.trajectory, lease.trajectory], out=room)
        with pytest.raises(Conflict, match="trajectory 99 is not in the store"):
            store.read_tokens([99])
        with pytest.raises(Conflict, match="iteration 7 has no claim"):
            store.read_rows(7)


def test_a_batch_and_its_claim_are_the_same() -> None:
    batch = make_batch(9)
    claim = Claim.of(batch)
    every = np.arange(len(batch.rewards))
    assert_same(claim.batch(every, batch.read(every)), batch)
    assert len(claim.segment_lengths) < len(batch.tokens) / 4
    empty = claim.batch(every[:0], batch.read(every[:0]))
    assert (len(empty.tokens), empty.cu_seqlens.tolist()) == (0, [0])


def test_segments_may_come_as_an_array_or_a_view() -> None:
    store = ready_store()
    admit(store)
    leases = lease_all(store)
    encoded = [encode_segments([segment(lease, 4)]) for lease in leases]
    store.append(np.frombuffer(encoded[0], np.uint8))
    store.append(memoryview(encoded[1]))
    assert [len(store.trajectory(lease.trajectory)["tokens"]) for lease in leases] == [4, 4]
    with pytest.raises(ValueError, match="contiguous"):
        store.append(np.frombuffer(encoded[0] * 2, np.uint8)[::2])
