"""Columns that scorers add to complete trajectories, as callers of the store see them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pmdflow.store import Conflict, TrajectoryStore
from pmdflow.store.annotations import Unannotated
from pmdflow.store.archive import read_part, write_part
from tests.support.filled_store import admit, lease_all, open_store, quota, segment

SCORERS = ("teacher", "critic")


def opened(path: Path | None, **settings) -> TrajectoryStore:
    given = {"max_staleness": None, "scorers": SCORERS, **settings}
    store = open_store(path, **given)
    if store.counts().version < 0:
        store.publish(0)
        store.set_quota(quota())
    return store


def completed(store: TrajectoryStore) -> list[int]:
    """A group of two, complete: two tokens and one."""
    admit(store, size=2)
    leases = sorted(lease_all(store), key=lambda lease: lease.trajectory)
    for lease, count in zip(leases, (2, 1), strict=True):
        store.append([segment(lease, count, stop="stop")])
    return [lease.trajectory for lease in leases]


def told(item: Unannotated, scale: float) -> dict[str, np.ndarray]:
    return {"value": (scale * item.tokens).astype(np.float32), "pairs": np.stack([item.tokens, -item.tokens], 1)}


def annotate_all(store: TrajectoryStore, scorer: str) -> list[int]:
    items = store.unannotated(scorer, 8, 60.0, 0.0)
    for item in items:
        own = told(item, 1.0 if scorer == "teacher" else 0.5)
        store.annotate(item.trajectory, scorer, {f"{scorer}_{name}": values for name, values in own.items()})
    return [item.trajectory for item in items]


def test_a_group_is_ready_when_rewards_and_every_column_are_there(tmp_path: Path) -> None:
    store = opened(tmp_path)
    ids = completed(store)
    assert store.unscored(8, 60.0, 0.0) == [], "scorers first"
    assert store.counts().trajectories_unscored == 2 and store.ledger()["unscored"] == 3
    assert annotate_all(store, "teacher") == ids
    assert store.unannotated("teacher", 8, 60.0, 0.0) == store.unscored(8, 60.0, 0.0) == []
    store.close()

    store = opened(tmp_path)
    assert store.unannotated("teacher", 8, 60.0, 0.0) == [], "what it said is durable"
    assert annotate_all(store, "critic") == ids
    for item in store.unscored(8, 60.0, 0.0):
        store.score(item.trajectory, item.attempt, "scored", 1.0)
    assert store.claim(1, 0, timeout_s=0.0).status == "claimed"
    batch = store.read_claim(1)
    generated = batch.versions >= 0
    np.testing.assert_array_equal(batch.extra["teacher_value"][generated], batch.tokens[generated])
    np.testing.assert_array_equal(batch.extra["critic_value"][generated], 0.5 * batch.tokens[generated])
    np.testing.assert_array_equal(batch.extra["critic_pairs"][generated][:, 1], -batch.tokens[generated])
    write_part(tmp_path / "run", batch, attrs={})
    kept = read_part(next((tmp_path / "run" / "archive").glob("part-*")))
    np.testing.assert_array_equal(kept.extra["teacher_value"], batch.extra["teacher_value"])


def test_a_repeat_changes_nothing_and_what_cannot_be_meant_is_refused() -> None:
    store = opened(None)
    admit(store, size=2)
    (first, second) = lease_all(store)
    with pytest.raises(Conflict, match="is not complete and cannot be annotated"):
        store.annotate(first.trajectory, "teacher", {"a": np.zeros(0, np.float32)})
    store.append([segment(lease, 2, stop="stop") for lease in (first, second)])
    (item, _) = store.unannotated("teacher", 8, 60.0, 0.0)
    assert (item.attempt, item.forks, item.temperatures.tolist()) == (0, (), [1.0, 1.0])
    for columns, why in (
        ({"a": np.zeros(3)}, "24 bytes for 2 values of 8"),
        ({"a": np.zeros(2, complex)}, "give numbers of 1 to 8 bytes"),
        ({}, "a column"),
    ):
        with pytest.raises((Conflict, ValueError), match=why):
            store.annotate(item.trajectory, "teacher", columns)
    store.annotate(item.trajectory, "teacher", {"a": np.array([1.5, 2.5])})
    before = store.counts().lsn
    store.annotate(item.trajectory, "teacher", {"a": np.array([9.0, 9.0])})
    assert store.counts().lsn == before
    np.testing.assert_array_equal(store.trajectory(item.trajectory)["extra"]["a"][0][2], [1.5, 2.5])
    with pytest.raises(Conflict, match='has the column "a" already'):
        store.annotate(item.trajectory, "critic", {"a": np.zeros(2)})
    with pytest.raises(Conflict, match="those of this store are: critic, teacher"):
        store.unannotated("other", 1, 1.0, 0.0)
    with pytest.raises(Conflict, match=r"never admitted|not in the store"):
        store.annotate(99, "teacher", {"a": np.zeros(2)})


def test_a_scorer_that_fails_is_retried_like_a_reward_and_others_keep_what_they_hold() -> None:
    store = opened(None, max_attempts=2, min_group_size=1)
    completed(store)
    (item, other) = store.unannotated("teacher", 8, 60.0, 0.0, now_s=0.0)
    assert len(store.unannotated("critic", 8, 60.0, 0.0, now_s=0.0)) == 2
    assert store.unannotated("teacher", 8, 60.0, 0.0, now_s=59.0) == [], "an actor has it"
    store.annotate(other.trajectory, "teacher", {"a": np.zeros(1)}, now_s=59.0)
    assert [one.trajectory for one in store.unannotated("teacher", 8, 60.0, 0.0, now_s=61.0)] == [item.trajectory]
    store.score(item.trajectory, item.attempt, "infra_failure")
    (again,) = store.unannotated("teacher", 8, 60.0, 0.0, now_s=62.0)
    assert (again.trajectory, again.attempt) == (item.trajectory, 1)
    store.score(item.trajectory, 1, "infra_failure")
    store.annotate(item.trajectory, "critic", {"b": np.zeros(2)})
    assert store.trajectory(item.trajectory)["state"] == "failed", "given up, and what comes late is left"
    assert store.unannotated("teacher", 8, 60.0, 0.0, now_s=500.0) == []


def test_branches_are_scored_in_their_own_histories() -> None:
    item = Unannotated(
        trajectory=0,
        attempt=0,
        metadata={},
        prompt=np.array([9], np.int32),
        tokens=np.arange(6, dtype=np.int32),
        observed=np.array([0, 0, 1, 0, 1, 0], np.uint8),
        temperatures=np.ones(6, np.float32),
        forks=((7, 3, 1), (8, 5, 2)),
    )
    # 0 1 2 | fork after 1: 0, then 3 4 | fork after 2 of that history: 0 3, then 5
    found = [(history.tolist(), own.tolist()) for history, own in item.branches()]
    assert found == [([0, 1, 2], [0, 1]), ([0, 3, 4], [3]), ([0, 3, 5], [5])]


def test_what_is_out_for_its_reward_is_not_handed_out_again_when_its_file_is_emptied(tmp_path: Path) -> None:
    with opened(tmp_path, scorers=("t",), file_bytes=4096, min_group_size=1, groups_per_iteration=32) as store:
        store.set_quota(quota(groups=200, tokens=100_000))
        for number in range(24):
            admit(store, number, size=1)
        for lease in lease_all(store):
            store.append([segment(lease, 8, stop="stop")])
        for item in store.unannotated("t", 100, 60.0, 0.0):
            store.annotate(item.trajectory, "t", {"v": np.ones((len(item.tokens), 16), np.float32)})
        assert len(store.unscored(100, 3600.0, 0.0)) == 24
        for index, group in enumerate(list(store.groups())):
            if index % 6:
                store.discard(group["group"], reason="its file is to be emptied")
        again = [item.trajectory for _ in range(10) for item in store.unscored(100, 3600.0, 0.1)]
        assert again == []
