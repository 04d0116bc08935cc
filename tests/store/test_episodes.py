"""Episodes of several branches: forks in leases, claims, the ledger and the archive."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmdflow.store import Conflict, TrajectoryStore, encode_segments
from pmdflow.store.archive import read_part, read_table, write_part
from pmdflow.store.episodes import MAX_FORKS
from pmdflow.types import Lease, Mask, Segment, StopReason, TrainBatch
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


def test_a_claim_comes_as_rows_and_tokens_as_it_comes_whole(tmp_path: Path) -> None:
    claimed(tmp_path).close()
    store = ready_store(tmp_path)
    batch, claim = store.read_claim(1), store.read_rows(1)
    assert claim.branches is not None and batch.branches is not None
    assert claim.branches.episodes.tolist() == batch.branches.episodes.tolist() == [0, 0, 0, 1]
    assert claim.branches.parents.tolist() == batch.branches.parents.tolist()
    assert claim.branches.fork_offsets.tolist() == batch.branches.fork_offsets.tolist()
    assert store.count_tokens(claim.trajectories) == len(batch.tokens)
    for order in (np.arange(4), np.array([3, 2, 0, 1]), np.array([1])):
        own = claim.batch(order, store.read_tokens(claim.trajectories[order]))
        parts = [slice(*batch.cu_seqlens[row : row + 2]) for row in order]
        for name in ("tokens", "logprobs", "versions", "temperatures", "mask"):
            whole = np.concatenate([getattr(batch, name)[part] for part in parts])
            np.testing.assert_array_equal(getattr(own, name), whole, err_msg=name)
    for flags in (Mask.GENERATED, Mask.TRAINED):
        assert claim.count(flags).tolist() == batch.count(flags).tolist() == [4, 2, 1, 3]
    with pytest.raises(Conflict, match="trajectory 4 is not in the store"):
        store.read_tokens([2, 4])


@pytest.mark.parametrize("values", [{}, {"hard": 0.5}])
def test_a_token_has_its_extra_columns_in_the_branch_in_which_it_came(tmp_path: Path, values: dict[str, float]) -> None:
    store = ready_store(tmp_path)
    admit(store)
    first, second = lease_all(store)
    store.append(encode_segments([said(first, 0, 10, 11, 12)], extra=[{"layer": [1, 2, 3]}]))
    again = forked(store, first, 2)
    last = said(again, 2, 20, 21, stop="stop")
    store.append(encode_segments([last], extra=[{"layer": [4, 5]}], trajectory_extra=[values]))
    store.append([said(second, 0, 40, stop="stop")])
    for item in store.unscored(9, 60.0, 0.0):
        store.score(item.trajectory, 0, "scored", 1.0)
    assert store.claim(1, 0, 0.0).status == "claimed"
    deadline = time.monotonic() + 20.0
    while not values and len(store.trajectory(0)["extra"]["layer"]) > 1:  # its runs become one, across the fork
        assert time.monotonic() < deadline
        time.sleep(0.01)
    batch, claim = store.read_claim(1), store.read_rows(1)
    assert rows(batch) == [[10, 11, 12], [10, 11, 20, 21], [40]]
    assert batch.mask.tolist() == [*[0] * 3, 3, 3, 3, *[0] * 5, 3, 3, *[0] * 3, 3]
    assert (store.read_tokens(claim.trajectories).logprobs == batch.logprobs).all()
    assert claim.count(Mask.TRAINED).tolist() == [3, 2, 1]
    assert rows(replace(batch, tokens=batch.extra["layer"])) == [[1, 2, 3], [0, 0, 4, 5], [0]]
    for name, value in values.items():
        np.testing.assert_array_equal(batch.trajectory_extra[name], [value, value, np.nan])
    assert_exact(store)


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


def test_an_episode_is_forked_so_often_and_no_more() -> None:
    store = ready_store()
    admit(store, max_tokens=MAX_FORKS + 9)
    lease = lease_all(store)[0]
    store.append([said(lease, 0, 9)])
    for _ in range(MAX_FORKS):
        lease = forked(store, lease, 0)
        store.append([said(lease, 0, 9)])
    with pytest.raises(Conflict, match="at most 1024 times"):
        store.fork(lease.trajectory, lease.epoch, 0)


def test_the_id_of_a_branch_is_not_taken_for_an_episode_that_is_gone() -> None:
    store = ready_store(min_group_size=1)
    admit(store)
    lease, _ = lease_all(store)
    store.append([said(lease, 0, 10, 11)])
    answer = store.fork(lease.trajectory, lease.epoch, 1)
    lease = replace(lease, epoch=answer.epoch)
    store.append([said(lease, 1, 20, stop="stop")])
    named = f"trajectory {answer.branch} is a branch of the episode {lease.trajectory}"
    with pytest.raises(Conflict, match=named):
        store.score(answer.branch, 0, "scored", 1.0)
    with pytest.raises(Conflict, match=named):
        store.annotate(answer.branch, "scorer", {"worth": np.zeros(3)})
    store.score(lease.trajectory, 0, "scored", 1.0)
