"""One policy version a trajectory: who is leased what, what drains, what counts as in flight, and what is lost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pmdflow.store import TrajectoryStore
from pmdflow.types import Lease
from tests.support.filled_store import PROMPT, admit, quota, ready_store, segment


def one_version_store(**settings: Any) -> TrajectoryStore:
    return ready_store(one_version=True, lookahead=2, **settings)


def give_back(store: TrajectoryStore, lease: Lease, tokens: int, *, version: int = 0) -> None:
    offset = len(lease.prefix)
    store.append([segment(lease, tokens, offset=offset, version=version, stop="abort")])


def leased(store: TrajectoryStore, version: int, most: int = 8) -> list[int]:
    return [lease.trajectory for lease in store.lease(f"at-{version}", version, most, 0.0)]


def publish(store: TrajectoryStore, version: int, tokens: int = 1000) -> None:
    store.publish(version)
    store.set_quota(quota(version, tokens=tokens))


def test_a_worker_goes_on_with_its_own_version_alone_and_the_newest_begins() -> None:
    store = one_version_store()
    admit(store)
    admit(store, 1)
    first, second = store.lease("w", 0, 2, 0.0)
    give_back(store, first, 3)
    give_back(store, second, 5)
    publish(store, 1)
    assert leased(store, 1) == [2, 3]  # not begun yet
    assert leased(store, 1) == []
    assert leased(store, 0) == [0, 1]


def test_a_held_trajectory_is_granted_nothing_under_another_version() -> None:
    store = one_version_store(grant_tokens=4)
    admit(store)
    begun, empty = store.lease("w", 0, 2, 0.0)
    store.append([segment(begun, 2)])
    publish(store, 1)
    _, (own,) = store.append([segment(begun, 1, offset=2)])
    assert own.tokens == 4
    _, (other,) = store.append([segment(begun, 0, offset=3, next_version=1)])
    assert other.tokens == 0
    _, (fresh,) = store.append([segment(empty, 0, next_version=1)])
    assert fresh.tokens == 4, "it has no token: the newest version may begin it"


def test_an_old_version_finishes_what_it_began_whatever_its_budget_was() -> None:
    store = one_version_store(groups_per_iteration=1, grant_tokens=2)
    store.set_quota(quota(0, tokens=4))
    admit(store, size=2, max_tokens=20)
    first, second = store.lease("w", 0, 2, 0.0)
    give_back(store, first, 2)
    give_back(store, second, 2)
    assert leased(store, 0) == []
    assert store.claim(1, 0, 0.0).reason == "closed"
    publish(store, 1, tokens=50)
    assert leased(store, 1) == []
    assert store.claim(1, 1, 0.0).status == "timeout", "rollout is not closed: version 0 drains"
    assert leased(store, 0) == [0, 1]


def test_what_is_in_flight_has_a_version_and_drains() -> None:
    store = one_version_store()
    admit(store)
    assert store.in_flight() == {0: 2}
    lease, held = store.lease("w", 0, 2, 0.0)
    give_back(store, lease, 3)
    publish(store, 1)
    admit(store, 1)
    assert store.in_flight() == {0: 2, 1: 2}, "what is leased without a token is of its lease's version"
    assert not store.wait_drained(1, 0.0)
    store.append([segment(held, 2, stop="stop")])
    (lease,) = store.lease("w", 0, 1, 0.0)
    store.append([segment(lease, 2, offset=3, stop="stop")])
    assert store.in_flight() == {1: 2}
    assert store.wait_drained(1, 0.0)


def test_what_a_lost_version_began_goes_on_under_the_newest() -> None:
    store = one_version_store()
    admit(store)
    for lease in store.lease("w", 0, 2, 0.0):
        give_back(store, lease, 3)
    publish(store, 1)
    publish(store, 2)
    assert leased(store, 2) == []
    store.set_oldest(1)
    store.set_oldest(0)  # never lowered
    assert leased(store, 1) == []
    assert store.in_flight() == {2: 2}
    lease = store.lease("w", 2, 1, 0.0)[0]
    _, (grant,) = store.append([segment(lease, 2, offset=3, version=2, next_version=2)])
    assert grant.tokens > 0
    assert [part[1] for part in store.trajectory(lease.trajectory)["segments"]] == [0, 2]


def test_evaluation_is_begun_by_the_newest_and_is_of_one_version() -> None:
    store = one_version_store()
    publish(store, 1)
    store.admit("eval-0", PROMPT, group_size=1, max_tokens=20, kind="eval")
    assert leased(store, 0) == []
    (lease,) = store.lease("w", 1, 1, 0.0)
    give_back(store, lease, 2, version=1)
    publish(store, 2)
    assert leased(store, 2) == []
    assert leased(store, 1) == [lease.trajectory]


@pytest.mark.parametrize("one_version", [False, True])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_an_evaluation_that_is_asked_for_alone_is_of_one_version(one_version: bool, lookahead: int) -> None:
    store = ready_store(one_version=one_version, lookahead=lookahead)
    admit(store)
    for number in range(3):
        store.admit(f"eval-{number}", PROMPT, kind="eval", group_size=1, max_tokens=9)
    assert [lease.kind for lease in store.lease("trains", 0, 1, 0.0, kind="train")] == ["train"]
    begun, _ = store.lease("dies", 0, 2, 0.0, kind="eval")
    store.append([segment(begun, 3)])
    publish(store, 1)
    store.fence("dies")
    assert [lease.trajectory for lease in store.lease("newer", 1, 1, 0.0, kind="eval")] == [begun.trajectory + 1]
    left = store.lease("older", 0, 9, 0.0, kind="eval")  # begun by its version, or by none
    assert [(lease.trajectory, lease.grant) for lease in left] == [(begun.trajectory, 6), (begun.trajectory + 2, 9)]
    assert store.append([segment(left[1], 2)])[1][0].tokens == 7, "an old version may begin what is evaluated"
    assert store.lease("older", 0, 9, 0.0, kind="eval") == store.lease("newer", 1, 9, 0.0, kind="eval") == []


def test_who_waits_for_a_version_to_drain_is_woken_by_the_last_lease_that_leaves_it() -> None:
    store = one_version_store()
    admit(store)
    lease = store.lease("w", 0, 1, 0.0)[0]
    publish(store, 1)
    assert 0 in store.in_flight()
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:  # in the main thread it would look again by itself, for Ctrl-C
        drained = pool.submit(store.wait_drained, 1, 60.0)
        time.sleep(0.2)
        store.append([segment(lease, 0, version=1)])
        assert drained.result()
    assert time.monotonic() - begun < 30
