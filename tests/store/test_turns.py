"""Notes on an episode: durable, once, and only by who holds the lease."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pmdflow.store import Conflict, TrajectoryStore
from pmdflow.types import Lease, Prompt, Quota, Segment


def open_store(path: Path) -> TrajectoryStore:
    return TrajectoryStore(path, groups_per_iteration=1, lookahead=1, max_staleness=None)


def leased(store: TrajectoryStore) -> list[Lease]:
    store.publish(0)
    store.set_quota(Quota(version=0, groups=1, tokens=100, tokens_per_segment=None))
    prompt = Prompt(id="p", text="?", tokens=np.array([1], np.int32))
    store.admit("r", prompt, group_size=2, max_tokens=8, cursor=0)
    return store.lease("w", 0, 2, 0.0)


def end(lease: Lease, tokens: int) -> Segment:
    return Segment(
        trajectory=lease.trajectory, epoch=lease.epoch, offset=0, version=0, temperature=1.0, next_version=0,
        tokens=np.full(tokens, 5, np.int32), logprobs=np.full(tokens, -1, np.float32), stop="stop",
    )  # fmt: skip


def test_notes_are_summed_and_survive_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first, second = leased(store)
    assert not store.turn(first.trajectory, first.epoch, 0, {"a": 0.5}, "room 1")
    assert not store.turn(first.trajectory, first.epoch, 0, {"a": 0.5}, "room 1")  # a repeat
    assert not store.turn(first.trajectory, first.epoch, 1, {"a": 0.25, "b": -1.0})
    store.append([end(first, 3), end(second, 2)])
    store.close()
    store = open_store(tmp_path)
    assert store.trajectory(first.trajectory)["turns"] == [
        (0, {"a": 0.5}, "room 1"),
        (0, {"a": 0.25, "b": -1.0}, None),
    ]
    assert [item.rewards for item in store.unscored(2, 9.0, 0.0)] == [{"a": 0.75, "b": -1.0}, {}]
    store.close()


def test_who_has_lost_the_lease_notes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first, _ = leased(store)
    store.fence("w")
    assert store.turn(first.trajectory, first.epoch, 0, {"a": 1.0})
    assert store.trajectory(first.trajectory)["turns"] == []
    store.close()


@pytest.mark.parametrize(
    ("number", "rewards", "epoch", "why"),
    [
        (1, {"a": 1.0}, 0, "has 0 notes"),
        (0, {"a": float("nan")}, 0, "must be finite"),
        (0, {"a": 1.0}, 1, "never given out"),
    ],
)
def test_bad_notes_change_nothing(tmp_path: Path, number: int, rewards: dict[str, float], epoch: int, why: str) -> None:
    store = open_store(tmp_path)
    first, _ = leased(store)
    with pytest.raises(Conflict, match=why):
        store.turn(first.trajectory, first.epoch + epoch, number, rewards)
    assert store.trajectory(first.trajectory)["turns"] == []
    store.close()


def test_a_number_that_no_note_can_have_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    lease, _ = leased(store)
    with pytest.raises(Conflict, match="has 0 notes; this one is given as number 18446744073709551615"):
        store.turn(lease.trajectory, lease.epoch, 2**64 - 1, {})
    assert not store.turn(lease.trajectory, lease.epoch, 0, {"a": 0.5})
    store.close()
