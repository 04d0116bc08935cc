"""Groups of the trajectory store: late members, priorities, over-age groups; and queries and packing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmdflow._rust_buffer import pack
from pmdflow.store import StoredTrajectory, TrajectoryStore
from pmdflow.store.view import PAGE_GROUPS
from pmdflow.types import Stop
from tests.support.filled_store import (
    PROMPT,
    admit,
    assert_exact,
    lease_all,
    open_store,
    quota,
    ready_store,
    score_all,
    segment,
)


def straggling(path: Path | None = None, *, now_s: float = 10.0, **options: Any) -> tuple[TrajectoryStore, list[Any]]:
    """A group of four: two scored at `now_s`, one complete and unscored, one leased with 5 tokens."""
    store = ready_store(path, straggler=(2, 3.0), **options)
    admit(store, size=4)
    leases = lease_all(store, now_s=now_s)
    for lease, stop in zip(leases, ("stop", "stop", "stop", None), strict=True):
        store.append([segment(lease, 5, stop=stop)], now_s=now_s)
    for item in store.unscored(2, 60.0, 0.0, now_s=now_s):
        store.score(item.trajectory, item.attempt, "scored", 1.0, now_s=now_s)
    return store, leases


class TestStragglers:
    def test_a_group_is_ready_without_its_late_members_when_their_time_is_over(self) -> None:
        store, leases = straggling()
        assert store.claim(1, 0, 0.0, now_s=12.9).status == "timeout"
        assert [row["late"] for row in store.groups("partial")] == [0]
        claim = store.claim(1, 0, 0.0, now_s=13.0)
        assert claim.status == "claimed"
        batch = store.read_claim(1)
        assert batch.trajectories.tolist() == [lease.trajectory for lease in leases[:2]]
        ledger = assert_exact(store)
        assert (ledger["claimed"], ledger["evicted_late"]) == (10, 10)
        assert store.counts().trajectories_late == 2
        (group,) = store.groups()
        assert (group["scored"], group["late"], group["tokens"]) == (2, 2, 10)

    def test_late_members_are_fenced_and_their_scores_ignored(self) -> None:
        store, leases = straggling()
        _, (grant,) = store.append([segment(leases[3], 1, offset=5)], now_s=13.0)
        assert (grant.stale, grant.tokens) == (True, 0)
        before = store.counts().lsn
        for lease in leases[2:]:
            assert store.trajectory(lease.trajectory)["state"] == "late"
            store.score(lease.trajectory, 0, "scored", 1.0, now_s=13.0)
            store.score(lease.trajectory, 0, "infra_failure", now_s=13.0)
        assert store.counts().lsn == before
        assert store.unscored(10, 1.0, 0.0, now_s=99.0) == []
        assert lease_all(store, now_s=99.0) == []

    def test_a_waiting_claim_wakes_by_itself(self) -> None:
        store = ready_store(straggler=(1, 0.2), min_group_size=1)
        admit(store)
        answers: list[str] = []
        claim = threading.Thread(target=lambda: answers.append(store.claim(1, 0, 30.0).status))
        claim.start()
        first, _ = lease_all(store)
        store.append([segment(first, 3, stop="stop")])
        score_all(store)
        claim.join(10.0)
        assert answers == ["claimed"]

    def test_a_score_in_time_keeps_the_member(self) -> None:
        store, leases = straggling()
        store.append([segment(leases[3], 1, offset=5, stop="stop")], now_s=12.0)
        for item in store.unscored(2, 60.0, 0.0, now_s=12.9):
            store.score(item.trajectory, item.attempt, "scored", 1.0, now_s=12.9)
        assert store.claim(1, 0, 0.0, now_s=99.0).status == "claimed"
        assert (store.counts().trajectories_late, len(store.read_claim(1).stops)) == (0, 4)

    def test_reports_are_taken_once(self) -> None:
        store, _ = straggling()
        store.claim(1, 0, 0.0, now_s=13.0)
        (report,) = store.take_late()
        assert (report.group, report.prompt_id, report.members, report.tokens) == (0, "p", 2, 10)
        assert store.take_late() == []

    def test_the_wait_starts_again_at_opening_and_the_outcome_is_durable(self, tmp_path: Path) -> None:
        store, _ = straggling(tmp_path)
        store.close()
        store = open_store(tmp_path, straggler=(2, 3.0))
        assert store.claim(1, 0, 0.0, now_s=100.0).status == "timeout"
        assert store.claim(1, 0, 0.0, now_s=103.0).status == "claimed"
        ledger = assert_exact(store)
        store.close()
        store = open_store(tmp_path)
        assert (store.ledger(), store.counts().trajectories_late) == (ledger, 2)
        assert store.uncommit(0) == [1]
        assert assert_exact(store)["evicted_late"] == 10
        assert store.claim(1, 0, 0.0).groups == (0,)

    def test_evaluation_waits_for_everybody(self) -> None:
        store = ready_store(straggler=(1, 0.0), min_group_size=1)
        store.admit("eval-0", PROMPT, kind="eval", group_size=2, max_tokens=9)
        first, _ = lease_all(store, now_s=0.0)
        store.append([segment(first, 3, stop="stop")], now_s=0.0)
        score_all(store)
        assert store.eval_results("eval-", 0.0) is None

    def test_fewer_than_a_group_needs_are_refused(self) -> None:
        with pytest.raises(ValueError, match="straggler has 1 members, min_group_size is 2"):
            ready_store(straggler=(1, 1.0))


class TestPriority:
    def test_higher_ones_are_started_first_and_partial_ones_continued_before(self) -> None:
        store = ready_store()
        groups = [
            store.admit(f"train-{number}", PROMPT, cursor=number, group_size=1, max_tokens=9, priority=priority)
            for number, priority in enumerate((0, -1, 5, 5))
        ]
        (started,) = store.lease("worker", 0, 1, 0.0)
        assert started.group == groups[2]
        store.append([segment(started, 1, stop="budget")])
        order = [lease.group for lease in store.lease("worker", 0, 9, 0.0)]
        assert order == [groups[2], groups[3], groups[0], groups[1]]
        assert [row["priority"] for row in store.groups()] == [0, -1, 5, 5]

    def test_it_belongs_to_the_admission(self) -> None:
        store = ready_store()
        arguments: dict[str, Any] = {"cursor": 0, "group_size": 2, "max_tokens": 20}
        group = store.admit("train-0", PROMPT, priority=3, **arguments)
        assert store.admit("train-0", PROMPT, priority=3, **arguments) == group
        with pytest.raises(Exception, match="other content"):
            store.admit("train-0", PROMPT, priority=4, **arguments)


class TestOverAge:
    def test_a_claim_that_starves_by_age_says_so_instead_of_waiting(self) -> None:
        store = ready_store(max_staleness=0, lookahead=0)
        group = admit(store)
        for lease in lease_all(store):
            store.append([segment(lease, 4, stop="stop")])
        store.publish(1)
        store.set_quota(quota(1))
        score_all(store)
        answer = store.claim(1, 1, 30.0)
        assert (answer.status, answer.reason) == ("starved", "over_age")
        assert assert_exact(store)["evicted_over_age"] == 8
        assert list(store.groups()) == []

        assert admit(store, 1) != group
        for lease in lease_all(store, version=1):
            store.append([segment(lease, 4, version=1, stop="stop")])
        score_all(store)
        answer = store.claim(1, 1, 30.0)
        assert (answer.status, answer.reason) == ("claimed", None)

    def test_it_says_so_while_others_are_still_generated(self) -> None:
        store = ready_store(max_staleness=0)
        admit(store)
        admit(store, 1)
        leases = lease_all(store)
        for lease in leases[:2]:
            store.append([segment(lease, 4, stop="stop")])
        score_all(store)
        store.publish(1)
        store.set_quota(quota(1))
        answer = store.claim(1, 1, 30.0)
        assert (answer.status, answer.reason) == ("starved", "over_age")
        assert store.claim(1, 1, 0.0).status == "timeout"
        assert [row["group"] for row in store.groups()] == [leases[2].group]

    def test_a_closed_rollout_starves_for_another_reason(self) -> None:
        answer = ready_store().claim(1, 0, 30.0)
        assert (answer.status, answer.reason) == ("starved", "closed")


@pytest.fixture(scope="module")
def mixed() -> TrajectoryStore:
    """Trajectories of every state, over several versions, claims and prompts."""
    store = ready_store(groups_per_iteration=2, straggler=(2, 5.0))
    for number in range(6):
        store.admit(f"train-{number}", PROMPT, cursor=number, group_size=3, max_tokens=12)
    store.admit("eval-0", PROMPT, kind="eval", group_size=2, max_tokens=12)
    for version in range(3):
        for lease in lease_all(store, version=version, now_s=0.0):
            done = (lease.trajectory + version) % 3 == 0
            count = min(1 + lease.trajectory % 4, 12 - len(lease.prefix))
            stop = "stop" if done else "budget"
            store.append([segment(lease, count, offset=len(lease.prefix), version=version, stop=stop)], now_s=0.0)
        for item in store.unscored(100, 60.0, 0.0, now_s=0.0):
            failed = item.trajectory == 4
            for attempt in range(3 if failed else 1):
                outcome = "infra_failure" if failed else "scored"
                store.score(item.trajectory, attempt, outcome, item.trajectory / 4, now_s=0.0)
        if store.claim(version + 1, version, 0.0, now_s=0.0).status == "claimed":
            store.publish(version + 1, version + 1)
        else:
            store.publish(version + 1)
        store.set_quota(quota(version + 1))
    store.admit("train-late", PROMPT, cursor=6, group_size=3, max_tokens=12)
    late = [lease for lease in lease_all(store, version=3, now_s=0.0) if lease.group == 7]
    for lease, stop in zip(late, ("stop", "stop", None), strict=True):
        store.append([segment(lease, 2, version=3, stop=stop)], now_s=0.0)
    for item in store.unscored(100, 60.0, 0.0, now_s=0.0):
        store.score(item.trajectory, item.attempt, "scored", 0.5, now_s=0.0)
    store.claim(9, 3, 0.0, now_s=5.0)
    store.admit("train-idle", PROMPT, cursor=7, group_size=2, max_tokens=12)
    return store


def plain(store: TrajectoryStore) -> list[tuple[StoredTrajectory, list[int]]]:
    """Every trajectory as `groups` and `trajectory` tell it, with the versions of its segments."""
    found = []
    for group in store.groups():
        for number in group["trajectories"]:
            view = store.trajectory(number)
            versions = [version for _, version, *_ in view["segments"]]
            row = StoredTrajectory(
                trajectory=number,
                group=group["group"],
                prompt_id=group["prompt_id"],
                kind=group["kind"],
                state=view["state"],
                group_state=group["state"],
                iteration=group["iteration"],
                reward=view["reward"],
                length=len(view["tokens"]),
                stop=view["stop"],
                first_version=versions[0] if versions else None,
                last_version=versions[-1] if versions else None,
            )
            found.append((row, versions))
    return found


def within(bounds: tuple[Any, Any], value: Any) -> bool:
    low, high = bounds
    return (low is None or value >= low) and (high is None or value <= high)


def bounds_of(values: Any) -> Any:
    return st.tuples(st.none() | values, st.none() | values)


class TestQueries:
    def test_the_store_of_these_tests_has_every_state(self, mixed: TrajectoryStore) -> None:
        rows = list(mixed.query())
        assert rows == [row for row, _ in plain(mixed)]
        assert {row.state for row in rows} >= {"idle", "scored", "failed", "late"}
        assert {row.kind for row in rows} == {"train", "eval"}
        assert {row.iteration for row in rows} > {None}

    @given(
        iteration=st.none() | st.integers(1, 4),
        version=bounds_of(st.integers(0, 3)),
        reward=bounds_of(st.floats(0, 4, width=16)),
        length=bounds_of(st.integers(0, 12)),
        stop=st.none() | st.sampled_from(Stop),
        prompt_id=st.none() | st.sampled_from(["p", "q"]),
        group=st.none() | st.integers(0, 8),
        kind=st.none() | st.sampled_from(["train", "eval"]),
        state=st.none()
        | st.sampled_from(["idle", "leased", "scored", "late", "failed", "partial", "trained", "ready"]),
    )
    @settings(max_examples=200)
    def test_a_query_is_a_plain_filter(self, mixed: TrajectoryStore, **wanted: Any) -> None:
        expected = [
            row
            for row, versions in plain(mixed)
            if wanted["iteration"] in (None, row.iteration)
            and (wanted["version"] == (None, None) or any(within(wanted["version"], v) for v in versions))
            and (wanted["reward"] == (None, None) or (row.reward is not None and within(wanted["reward"], row.reward)))
            and within(wanted["length"], row.length)
            and wanted["stop"] in (None, row.stop)
            and wanted["prompt_id"] in (None, row.prompt_id)
            and wanted["group"] in (None, row.group)
            and wanted["kind"] in (None, row.kind)
            and wanted["state"] in (None, row.state, row.group_state)
        ]
        assert list(mixed.query(**wanted)) == expected

    def test_it_is_read_page_by_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pmdflow.store.view.PAGE_ROWS", 2)
        store = ready_store()
        admit(store, size=3)
        rows = store.query()
        assert [next(rows).trajectory for _ in range(2)] == [0, 1]
        admit(store, 1, size=2)
        assert [row.trajectory for row in rows] == [2, 3, 4]

    def test_unknown_names_are_refused(self) -> None:
        store = ready_store()
        for name, value in (("state", "lost"), ("kind", "test"), ("stop", 9)):
            with pytest.raises(ValueError, match=name):
                next(store.query(**{name: value}))  # type: ignore[arg-type]


class TestPack:
    def test_steps_ranks_and_micro_batches(self) -> None:
        packed = pack([9, 1, 5, 5, 3], ranks=2, limit=10, steps=[4, 1])
        assert packed == [[[[0, 1]], [[2, 3]]], [[[4]], [[]]]]

    def test_what_it_refuses(self) -> None:
        for arguments in ({"ranks": 0, "limit": 1}, {"ranks": 1, "limit": 0}, {"ranks": 1, "limit": 9, "steps": [1]}):
            with pytest.raises(ValueError, match=r"ranks|steps"):
                pack([1, 2], **arguments)  # type: ignore[arg-type]


class TestPages:
    def test_groups_come_in_pages_each_as_the_store_is_then(self) -> None:
        store = ready_store()
        store.set_quota(quota(groups=3 * PAGE_GROUPS))
        for number in range(2 * PAGE_GROUPS + 1):
            admit(store, number)
        rows = store.groups()
        assert next(rows)["group"] == 0
        store.discard(1, "its page was read")
        store.discard(PAGE_GROUPS, "its page was not")
        admit(store, 2 * PAGE_GROUPS + 1)
        expected = [number for number in range(1, 2 * PAGE_GROUPS + 2) if number != PAGE_GROUPS]
        assert [row["group"] for row in rows] == expected
        assert list(store.groups("ready")) == []
