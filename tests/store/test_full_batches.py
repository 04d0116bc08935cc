"""Which ready groups a claim takes: those of the window, and those whose rewards say something."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pmdflow.store import TrajectoryStore
from tests.support.filled_store import PROMPT, admit, assert_exact, open_store, quota, ready_store, segment


def finish(store: TrajectoryStore, groups: set[int], *, reward: float | None = None) -> None:
    """Complete and score all members of these groups; without a reward, members alternate between 0 and 1."""
    for group in sorted(groups):
        for lease in store.lease_group("worker", group):
            store.append([segment(lease, 3, stop="stop")])
    for item in store.unscored(100, 60.0, 0.0):
        store.score(
            item.trajectory, item.attempt, "scored", float(item.trajectory % 2) if reward is None else reward, {}
        )


class TestWindow:
    def test_a_claim_waits_for_the_oldest_group_when_the_window_is_used_up(self) -> None:
        store = ready_store(groups_per_iteration=2, window=4)
        groups = [admit(store, number) for number in range(7)]
        finish(store, set(groups[1:]))
        for iteration, expected in ((1, groups[1:3]), (2, None)):
            answer = store.claim(iteration, iteration - 1, 0.0)
            if expected is None:
                assert answer.status == "timeout"  # of the window's four, one is ready and one still grows
            else:
                assert (answer.status, answer.groups) == ("claimed", tuple(expected))
                store.publish(iteration, iteration, {})
                store.set_quota(quota(iteration))

    def test_its_anchor_moves_on_with_the_oldest_group_that_is_not_ready(self) -> None:
        store = ready_store(groups_per_iteration=2, window=2)
        groups = [admit(store, number) for number in range(6)]
        finish(store, {groups[0], *groups[2:5]})
        assert store.claim(1, 0, 0.0).groups == (groups[0], groups[2]), "by one it may be passed"
        store.publish(1, 1, {})
        store.set_quota(quota(1))
        assert store.claim(2, 1, 0.0).status == "timeout"
        store.discard(groups[1], "gone")
        assert store.claim(2, 1, 0.0).groups == tuple(groups[3:5])

    def test_groups_without_a_signal_and_evaluation_take_no_place(self) -> None:
        store = ready_store(groups_per_iteration=2, window=2, signal=(0.0, 1.0))
        groups = [admit(store, number) for number in range(3)]
        store.admit("eval-0", PROMPT, kind="eval", group_size=1, max_tokens=4)
        groups += [admit(store, number) for number in range(3, 6)]
        finish(store, {groups[1], groups[2]}, reward=1.0)
        finish(store, {groups[0], *groups[3:5]})
        assert store.claim(1, 0, 0.0).reason == "no_signal"
        assert store.claim(1, 0, 0.0).groups == (groups[0], groups[3]), "others wait: it is full while rollout goes on"

    def test_groups_that_have_passed_keep_their_places_once_they_are_gone_and_lose_them_where_they_are_undone(
        self, tmp_path: Path
    ) -> None:
        store = ready_store(tmp_path, groups_per_iteration=2, window=4)
        groups = [admit(store, number) for number in range(7)]
        finish(store, set(groups[1:]))
        for _ in range(2):
            assert store.claim(1, store.counts().version, 0.0).groups == tuple(groups[1:3])
            store.uncommit(0)
        assert store.claim(1, store.counts().version, 0.0).groups == tuple(groups[1:3])
        store.publish(1, 1, {})
        store.set_quota(quota(1))
        store.commit(1)
        assert store.evict(1) == 2
        store.close()
        store = open_store(tmp_path, groups_per_iteration=2, window=4)
        assert store.claim(2, 1, 0.0).status == "timeout", "two have passed, one more may"
        finish(store, {groups[0]})
        assert store.claim(2, 1, 0.0).groups == (groups[0], groups[3])
        store.close()

    def test_a_group_that_has_been_passed_leaves_the_claim_whole_that_takes_it(self) -> None:
        store = ready_store(groups_per_iteration=2, window=3)
        groups = [admit(store, number) for number in range(6)]
        finish(store, set(groups[1:5]))
        assert store.claim(1, 0, 0.0).groups == tuple(groups[1:3])
        store.publish(1, 1, {})
        store.set_quota(quota(1))
        assert store.claim(2, 1, 0.0).status == "timeout"
        finish(store, {groups[0]})
        assert store.claim(2, 1, 0.0).groups == (groups[0], groups[3])

    def test_evaluation_groups_take_no_place(self) -> None:
        store = ready_store(groups_per_iteration=2, window=2)
        first = admit(store, 0)
        for number in range(5):
            store.admit(f"eval-{number}", PROMPT, kind="eval", group_size=1, max_tokens=4)
        second = admit(store, 1)
        finish(store, {first, second})
        assert store.claim(1, 0, 0.0).groups == (first, second)

    def test_a_window_below_a_claim_is_refused(self) -> None:
        with pytest.raises(ValueError, match="window is 1, below groups_per_iteration"):
            open_store(groups_per_iteration=2, window=1)


class TestSignal:
    def test_groups_that_say_nothing_leave_their_place_at_once_and_the_claim_is_told(self, tmp_path: Path) -> None:
        store = ready_store(tmp_path, groups_per_iteration=2, signal=(0.0, 1.0))
        groups = [admit(store, number) for number in range(3)]
        finish(store, {groups[0]}, reward=1.0)
        finish(store, {groups[1]}, reward=0.0)
        counts = store.counts()
        assert (counts.groups_untrained, counts.groups_no_signal) == (1, 2)
        answer = store.claim(1, 0, 0.0)
        assert (answer.status, answer.reason) == ("starved", "no_signal")
        assert store.claim(1, 0, 0.0).status == "timeout", "told once"
        finish(store, {groups[2]})
        assert store.claim(1, 0, 0.0).groups == (groups[2],), "closed: what is ready"
        ledger = assert_exact(store)
        assert (ledger["evicted_no_signal"], ledger["claimed"]) == (12, 6)
        store.close()
        again = open_store(tmp_path, groups_per_iteration=2)
        assert again.ledger() == ledger
        again.close()

    def test_what_a_crash_left_unjudged_is_judged_before_the_next_claim(self, tmp_path: Path) -> None:
        store = ready_store(tmp_path, groups_per_iteration=2)  # judges nothing: as a crash right after the last score
        groups = [admit(store, number) for number in range(3)]
        finish(store, {groups[0]}, reward=1.0)
        finish(store, {groups[1]})
        store.close()
        again = open_store(tmp_path, groups_per_iteration=2, signal=(0.0, 1.0))
        answer = again.claim(1, 0, 0.0)
        assert (answer.status, answer.reason) == ("starved", "no_signal")
        assert again.counts().groups_untrained == 2 and assert_exact(again)["evicted_no_signal"] == 6
        finish(again, {groups[2]})
        assert again.claim(1, 0, 0.0).groups == tuple(groups[1:])
        again.close()

    def test_a_claim_that_was_undone_is_made_again_whatever_its_rewards(self, tmp_path: Path) -> None:
        store = ready_store(tmp_path, groups_per_iteration=1)
        group = admit(store, 0)
        finish(store, {group}, reward=1.0)
        assert store.claim(1, 0, 0.0).groups == (group,)
        store.publish(1, 1, {})
        store.uncommit(0)
        store.close()
        again = open_store(tmp_path, groups_per_iteration=1, signal=(0.0, 1.0))
        assert again.claim(1, 1, 0.0).groups == (group,)
        again.close()

    def test_a_waiting_claim_is_woken(self) -> None:
        store = ready_store(groups_per_iteration=2, signal=(0.0, 1.0))
        groups = [admit(store, number) for number in range(2)]
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(store.claim(1, 0, 60.0)))
        waiting.start()
        finish(store, {groups[0]}, reward=1.0)
        waiting.join(timeout=30.0)
        assert [answer.reason for answer in answers] == ["no_signal"]

    def test_evaluation_is_never_judged(self) -> None:
        store = ready_store(signal=(0.0, 1.0))
        group = store.admit("eval-0", PROMPT, kind="eval", group_size=2, max_tokens=4)
        finish(store, {group}, reward=1.0)
        results = store.eval_results("eval-", 0.0)
        assert results is not None and [result.reward for result in results] == [1.0, 1.0]
