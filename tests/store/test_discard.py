"""Discarded groups, claims that are undone and made again, and commits of claims that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.store import Conflict, TrajectoryStore
from tests.support.filled_store import admit, assert_exact, complete, lease_all, quota, ready_store, segment


def trained(path: Path | None = None, *, claims: int = 2) -> TrajectoryStore:
    """A store with as many trained claims of one group."""
    store = ready_store(path, max_staleness=None)
    for iteration in range(1, claims + 1):
        admit(store, iteration - 1)
        complete(store, version=iteration - 1)
        assert store.claim(iteration, iteration - 1, 0.0).status == "claimed"
        store.publish(iteration, iteration, {"filter": [2 * iteration - 2]})
        store.set_quota(quota(iteration))
    return store


class TestDiscard:
    @pytest.mark.parametrize("state", ["leased", "unscored", "waiting", "ready"])
    def test_a_group_goes_whatever_its_members_do(self, state: str, tmp_path: Path) -> None:
        store = ready_store(tmp_path)
        group, other = admit(store), admit(store, 1)
        first, second = (lease for lease in lease_all(store) if lease.group == group)
        store.append([segment(first, 3), segment(second, 2)])
        if state != "leased":
            store.append([segment(first, 0, offset=3, stop="stop"), segment(second, 0, offset=2, stop="stop")])
        items = store.unscored(9, 60.0, 0.0)
        if state in {"waiting", "ready"}:
            store.score(first.trajectory, 0, "scored", 1.0)
        if state == "ready":
            store.score(second.trajectory, 0, "scored", 1.0)
        assert (store.discard(group, "its answer is wrong"), store.discard(group, "again")) == (True, False)
        assert store.append([segment(first, 1, offset=3)])[1][0].stale
        for item in items:
            store.score(item.trajectory, item.attempt, "scored", 1.0)
        assert [row["group"] for row in store.groups()] == [other]
        assert assert_exact(store)["evicted_discarded"] == 5
        assert store.counts().groups_untrained == 1
        store.close()
        assert assert_exact(ready_store(tmp_path))["evicted_discarded"] == 5

    def test_what_a_claim_has_stays(self) -> None:
        store = trained(claims=1)
        admit(store, 1)
        complete(store, version=1)
        store.claim(2, 1, 0.0)
        for group, state in ((0, "trained by iteration 1"), (1, "claimed by iteration 2")):
            with pytest.raises(Conflict, match=state):
                store.discard(group, "wanted gone")
        with pytest.raises(Conflict, match="group 7 is not in the store"):
            store.discard(7, "wanted gone")
        with pytest.raises(Conflict, match="reason"):
            store.discard(1, " ")

    def test_an_undone_claim_is_made_again_without_it(self) -> None:
        store = trained()
        assert store.uncommit(0) == [1, 2]
        store.discard(0, "poison")
        assert store.claim(1, 2, 0.0).groups == (1,)
        assert store.read_claim(1).version == 1


class TestUndoneClaims:
    def test_they_are_made_again_as_they_were_before_any_new_one(self, tmp_path: Path) -> None:
        store = trained(tmp_path)
        before = [store.read_claim(iteration) for iteration in (1, 2)]
        admit(store, 2)
        complete(store, version=2)
        assert store.uncommit(0) == [1, 2]
        store.close()
        store = ready_store(tmp_path, max_staleness=0, groups_per_iteration=3, segment_loss="current_only")
        store.publish(7)
        for was in before:
            version = store.counts().version
            answer = store.claim(was.iteration, version, 0.0)
            assert answer.groups == (was.iteration - 1,)
            assert store.claim(was.iteration, version, 0.0) == answer
            with pytest.raises(Conflict, match="repeat it with"):
                store.claim(was.iteration, version - 1, 0.0)
            again = store.read_claim(was.iteration)
            assert (again.iteration, again.version) == (was.iteration, was.version)
            store.publish(version + 1, was.iteration, {"filter": [2 * was.iteration - 2]})
            again = store.read_claim(was.iteration)
            for name in ("tokens", "logprobs", "versions", "mask", "groups", "trajectories", "rewards"):
                assert (getattr(again, name) == getattr(was, name)).all(), name
        store.commit(2)
        assert store.claim(3, 9, 0.0).status == "starved", "the third group is new, and over-age by now"
        assert_exact(store)

    def test_those_undone_twice_keep_their_order(self) -> None:
        store = trained(claims=3)
        store.uncommit(1)
        assert store.claim(2, 3, 0.0).groups == (1,)
        store.publish(4, 2)
        store.uncommit(0)
        for iteration in (1, 2, 3):
            assert store.claim(iteration, 3 + iteration, 0.0).groups == (iteration - 1,)
            store.publish(4 + iteration, iteration)
        assert_exact(store)

    def test_those_made_again_under_other_numbers_keep_their_order_when_undone_again(self) -> None:
        store = trained(claims=3)
        store.uncommit(0)
        assert store.claim(3, 3, 0.0).groups == (0,)
        store.uncommit(0)
        for iteration in (1, 2, 3):
            assert store.claim(iteration, 2 + iteration, 0.0).groups == (iteration - 1,)
            store.publish(3 + iteration, iteration)
        assert_exact(store)

    def test_a_publication_of_what_is_undone_is_no_repeat(self) -> None:
        store = trained(claims=1)
        store.publish(1, 1, {"filter": [0]})  # this one is
        store.uncommit(0)
        store.claim(1, 1, 0.0)
        with pytest.raises(Conflict, match="version 1 is not above the newest, 1; publish 2"):
            store.publish(1, 1, {"filter": [0]})
        store.publish(2, 1)
        assert store.claims() == {1: "trained"}


def test_a_commit_of_claims_that_are_not_there_names_them() -> None:
    store = trained()
    with pytest.raises(Conflict, match="iterations 3 to 5 have no claim"):
        store.commit(5)
    store.commit(2)
    store.evict(2)
    store.commit(2)
    store.commit(0)
    with pytest.raises(Conflict, match="iterations 1 to 1 have no claim"):
        ready_store().commit(1)
