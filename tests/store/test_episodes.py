"""Episodes of several branches: forks in leases, claims, the ledger and the archive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmdflow.store import Conflict, TrajectoryStore
from pmdflow.store.archive import read_part, read_table, write_part
from pmdflow.types import Lease, Segment, StopReason, TrainBatch
from tests.support.filled_store import admit, assert_exact, complete, lease_all, quota, ready_store


def said(lease: Lease, offset: int, *tokens: int, observed: bool = False, stop: StopReason | None = None) -> Segment:
    return Segment(
        trajectory=lease.trajectory,
        epoch=lease.epoch,
        offset=offset,
        version=0,
        temperature=1.0,
        tokens=np.array(tokens, np.int32),
        logprobs=-np.array(tokens, np.float32) / 8,
        next_version=0,
        stop=stop,
        observed=observed,
    )


def forked(store: TrajectoryStore, lease: Lease, offset: int) -> Lease:
    answer = store.fork(lease.trajectory, lease.epoch, offset)
    assert not answer.stale
    return replace(lease, epoch=answer.epoch)


def agent(store: TrajectoryStore, lease: Lease) -> None:
    """An episode of three branches: an agent twice rewrote what it had said."""
    store.append([said(lease, 0, 10, 11, 12, 13)])
    lease = forked(store, lease, 2)
    store.append([said(lease, 2, 20, observed=True)])
    store.append([said(lease, 3, 21, 22)])
    lease = forked(store, lease, 4)
    store.append([said(lease, 4, 30, stop="stop")])


def claimed(path: Path | None = None) -> TrajectoryStore:
    """A claim of one group: an episode of three branches and one of a single one."""
    store = ready_store(path)
    admit(store)
    first, second = lease_all(store)
    agent(store, first)
    store.append([said(second, 0, 40, 41, 42, stop="stop")])
    for item in store.unscored(9, 60.0, 0.0):
        store.score(item.trajectory, 0, "scored", float(item.trajectory), {"right": 1.0})
    assert store.claim(1, 0, 0.0).status == "claimed"
    return store


def rows(batch: TrainBatch) -> list[list[int]]:
    bounds = zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], batch.prompt_lengths, strict=True)
    return [batch.tokens[low + prompt : high].tolist() for low, high, prompt in bounds]


def test_each_branch_is_a_trajectory_of_the_claim_that_trains_what_came_in_it(tmp_path: Path) -> None:
    claimed(tmp_path).close()
    store = ready_store(tmp_path)
    batch = store.read_claim(1)
    assert rows(batch) == [[10, 11, 12, 13], [10, 11, 20, 21, 22], [10, 11, 20, 21, 30], [40, 41, 42]]
    assert batch.mask.tolist() == [*[0] * 3, 3, 3, 3, 3, *[0] * 6, 3, 3, *[0] * 7, 3, *[0] * 3, 3, 3, 3]
    assert (batch.logprobs[batch.mask == 0] == 0).all() and (batch.versions[batch.mask == 0] == -1).all()
    assert batch.logprobs[batch.mask > 0].tolist() == (-batch.tokens[batch.mask > 0] / 8).tolist()
    branches = batch.branches
    assert branches is not None
    assert batch.trajectories.tolist() == [0, 2, 3, 1]
    assert branches.episodes.tolist() == [0, 0, 0, 1]
    assert (branches.parents.tolist(), branches.fork_offsets.tolist()) == ([-1, 0, 2, -1], [0, 2, 4, 0])
    assert (batch.rewards.tolist(), batch.components["right"].tolist()) == ([0.0] * 3 + [1.0], [1.0] * 4)
    assert (batch.episode_shares() * 3).tolist() == pytest.approx([1, 1, 1, 3])
    assert (batch.first_branches().tolist(), batch.episode_of().tolist()) == ([0, 3], [0, 0, 0, 1])
    ledger = assert_exact(store)
    assert (ledger["generated"], ledger["claimed"], ledger["observed"]) == (10, 10, 1)


def test_a_branch_may_be_left_out_alone() -> None:
    store = claimed()
    with pytest.raises(Conflict, match=r"trajectory 4, .* is not in the claim"):
        store.publish(1, 1, {"veto": [4]})
    store.publish(1, 1, {"veto": [2]})
    assert store.read_claim(1).mask.tolist()[13:15] == [33, 33]
    ledger = assert_exact(store)
    assert (ledger["trained"], ledger["masked_veto"]) == (8, 2)


def test_the_archive_tells_branches(tmp_path: Path) -> None:
    store = claimed()
    batch = store.read_claim(1)
    path = write_part(tmp_path, batch, attrs={})
    table = read_table(path, "trajectory")
    assert table["id"].tolist() == [0, 2, 3, 1]
    assert [table[name].tolist() for name in ("episode", "parent", "fork_offset")] == [
        [0, 0, 0, 1], [-1, 0, 2, -1], [0, 2, 4, 0],
    ]  # fmt: skip
    read = read_part(path)
    assert read.branches is not None and batch.branches is not None
    assert read.branches.parents.tolist() == batch.branches.parents.tolist()
    assert (read.mask == batch.mask).all() and (read.tokens == batch.tokens).all()
    store.publish(1, 1)
    store.set_quota(quota(1))
    admit(store, 1)
    complete(store, version=1)
    assert store.claim(2, 1, 0.0).status == "claimed"
    plain = store.read_claim(2)
    assert plain.branches is None and plain.episode_shares().tolist() == [1.0, 1.0]
    assert "episode" not in read_table(write_part(tmp_path, plain, attrs={}), "trajectory")


def test_an_episode_has_one_lease_one_limit_and_one_score() -> None:
    store = ready_store()
    admit(store, max_tokens=6)
    first, second = lease_all(store)
    store.append([said(first, 0, 10, 11, 12, 13)])
    again = forked(store, first, 4)
    assert store.append([said(first, 4, 14)])[1][0].stale, "what was sent before the fork is fenced by it"
    assert store.fork(first.trajectory, first.epoch, 4) == store.fork(first.trajectory, first.epoch, 4)
    with pytest.raises(Conflict, match="forked with offset 4, not 3"):
        store.fork(first.trajectory, first.epoch, 3)
    with pytest.raises(Conflict, match="no token yet"):
        store.fork(first.trajectory, again.epoch, 2)
    with pytest.raises(Conflict, match="keeps 4 tokens"):
        store.append([said(again, 3, 14)])
    with pytest.raises(Conflict, match="limit is 6"):
        store.append([said(again, 4, 20, 21, 22)])
    store.append([said(again, 4, 20, stop="abort")])
    assert store.fork(first.trajectory, again.epoch, 0).stale, "the lease has ended"
    (held,) = store.lease("other", 0, 1, 0.0)
    assert (held.trajectory, held.prefix.tolist(), held.epoch) == (0, [10, 11, 12, 13, 20], again.epoch + 1)
    held = forked(store, held, 1)
    store.append([said(held, 1, 30)])  # the sixth token of the episode
    (item,) = store.unscored(9, 60.0, 0.0)
    assert (item.trajectory, item.tokens.tolist()) == (0, [10, 30])
    store.append([said(second, 0, 40, stop="stop")])
    assert len(store.unscored(9, 60.0, 0.0)) == 1
    for trajectory in (0, 1):
        store.score(trajectory, 0, "scored", 1.0)
    assert store.counts().groups_ready == 1, "the group has two members, whatever their branches"
    view = store.trajectory(0)
    assert (view["tokens"].tolist(), view["forks"]) == ([10, 11, 12, 13, 20, 30], [(2, 4, 4), (3, 5, 1)])
    assert_exact(store)
