"""The trajectory store through its typed facade: life of a trajectory, fences, repeats, claims, files and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmdflow.store import (
    Conflict,
    CorruptLog,
    StoreError,
    StoreFull,
    StoreLocked,
    TrajectoryStore,
    encode_segments,
)
from pmdflow.types import Grant, Lease, Mask, Stop, StopReason
from tests.support.filled_store import (
    PROMPT,
    admit,
    assert_exact,
    complete,
    lease_all,
    open_store,
    quota,
    ready_store,
    score_all,
    segment,
    snapshot,
)  # fmt: skip
from tests.support.paths import ROOT


def test_life_of_a_trajectory() -> None:
    store = ready_store(grant_tokens=6)
    group = admit(store)
    first, second = lease_all(store)
    assert (first.group, first.kind, first.grant, first.max_tokens, first.epoch) == (group, "train", 6, 20, 1)
    np.testing.assert_array_equal(first.prompt, PROMPT.tokens)
    assert (first.text, first.prefix.tolist()) == (PROMPT.text, [])

    lsn, grants = store.append([segment(first, 6), segment(second, 2, stop="stop")])
    assert grants == [
        Grant(trajectory=first.trajectory, stale=False, tokens=6),
        Grant(trajectory=second.trajectory, stale=False, tokens=0),
    ]
    assert store.wait_durable(lsn, 10.0)
    assert assert_exact(store) | {"partial_leased": 6, "unscored": 2} == store.ledger()

    store.append([segment(first, 1, offset=6, stop="budget")])
    assert store.counts().trajectories_partial == 1
    (again,) = lease_all(store, version=0)
    assert again.epoch == 2
    assert again.prefix.tolist() == [100 * first.trajectory + i for i in range(7)]
    assert store.ledger()["reprefill"] == 7
    store.publish(1)
    store.append([segment(again, 1, offset=7, version=1, stop="stop")])

    items = store.unscored(10, 60.0, 0.0)
    assert [(item.trajectory, item.stop, item.metadata, item.text) for item in items] == [
        (first.trajectory, Stop.STOP, {"answer": "2"}, PROMPT.text),
        (second.trajectory, Stop.STOP, {"answer": "2"}, PROMPT.text),
    ]
    assert store.unscored(10, 60.0, 0.0) == []
    for item in items:
        store.score(item.trajectory, 0, "scored", 0.5, {"right": 0.5})
    assert store.ledger()["ready"] == 10

    claim = store.claim(1, 1, 0.0)
    assert (claim.status, claim.groups) == ("claimed", (group,))
    batch = store.read_claim(1)
    assert batch.cu_seqlens.tolist() == [0, 11, 16]
    assert batch.versions[:11].tolist() == [-1] * 3 + [0] * 7 + [1]
    assert batch.mask[:11].tolist() == [0] * 3 + [int(Mask.GENERATED | Mask.TRAINED)] * 8
    np.testing.assert_array_equal(batch.tokens[3:11], [*again.prefix.tolist(), 100 * first.trajectory + 7])
    np.testing.assert_allclose(batch.logprobs[3:11], -batch.tokens[3:11].astype(np.float32) / 8)
    assert batch.prompt_lengths.tolist() == [3, 3]
    assert batch.components["right"].tolist() == [0.5, 0.5]
    assert batch.prompt_ids == ("p", "p")

    store.publish(2, 1, {"filter": [second.trajectory]})
    ledger = assert_exact(store)
    assert (ledger["trained"], ledger["masked_filter"], ledger["generated"]) == (8, 2, 10)
    store.commit(1)
    assert [(row["state"], row["text"]) for row in store.groups()] == [("committed", PROMPT.text)]
    assert store.evict(1) == 1
    assert list(store.groups()) == []
    assert assert_exact(store) == ledger


def test_segments_of_equal_version_and_temperature_are_one() -> None:
    store = ready_store()
    admit(store)
    lease = lease_all(store)[0]
    store.publish(1)
    for offset, version in ((0, 0), (2, 0), (4, 1), (6, 1)):
        store.append([segment(lease, 2, offset=offset, version=version, next_version=1)])
    view = store.trajectory(lease.trajectory)
    assert view["segments"] == [(4, 0, 1.0, False), (4, 1, 1.0, False)]
    assert view["tokens"].tolist() == [100 * lease.trajectory + i for i in range(8)]
    assert view["state"] == "leased"


def test_extra_columns_come_back() -> None:
    store = ready_store()
    admit(store)
    lease = lease_all(store)[0]
    experts = np.arange(4, dtype=np.int16).reshape(2, 2)
    store.append(encode_segments([segment(lease, 2)], extra=[{"experts": experts}]))
    store.append([segment(lease, 1, offset=2)])
    ((offset, length, values),) = store.trajectory(lease.trajectory)["extra"]["experts"]
    assert (offset, length, values.dtype, values.tolist()) == (0, 2, np.int16, [[0, 1], [2, 3]])


class TestLeases:
    def test_an_expired_lease_is_fenced(self) -> None:
        store = ready_store(lease_ttl_s=10.0)
        admit(store, size=1)
        (old,) = lease_all(store, now_s=0.0)
        store.append([segment(old, 3)], now_s=5.0)
        assert lease_all(store, now_s=14.9) == []
        (new,) = lease_all(store, now_s=15.0)
        assert (new.epoch, len(new.prefix)) == (old.epoch + 1, 3)
        before = snapshot(store)
        _, grants = store.append([segment(old, 2, offset=3)], now_s=15.0)
        assert grants == [Grant(trajectory=old.trajectory, stale=True, tokens=0)]
        assert snapshot(store) == before

    def test_a_fenced_worker_loses_its_leases_at_once_and_gets_none(self) -> None:
        store = ready_store()
        admit(store, size=2)
        (old,) = store.lease("dead", version=0, max_leases=1, timeout_s=0.0)
        (other,) = store.lease("alive", version=0, max_leases=2, timeout_s=0.0)
        store.append([segment(old, 3)])
        parked: list[list[Lease]] = []
        waiter = threading.Thread(target=lambda: parked.append(store.lease("dead", 0, 2, 0.5)))
        waiter.start()
        assert store.fence("dead") == 1
        (new,) = store.lease("successor", version=0, max_leases=2, timeout_s=20.0)
        assert (new.trajectory, new.epoch, len(new.prefix)) == (old.trajectory, old.epoch + 1, 3)
        waiter.join(timeout=20.0)
        assert parked == [[]]
        stale, alive = store.append([segment(old, 2, offset=3), segment(other, 2)])[1]
        assert stale.stale and not alive.stale

    def test_reopening_drops_leases_and_keeps_tokens(self, tmp_path: Path) -> None:
        store = ready_store(tmp_path)
        admit(store, size=1)
        (old,) = lease_all(store)
        store.append([segment(old, 3)])
        store.close()
        store = open_store(tmp_path)
        assert store.append([segment(old, 2, offset=3)])[1][0].stale
        (new,) = lease_all(store)
        assert (new.epoch, len(new.prefix)) == (2, 3)

    def test_grants_never_exceed_the_budget(self) -> None:
        store = ready_store(grant_tokens=8)
        store.set_quota(quota(tokens=20))
        for number in range(3):
            admit(store, number, size=2)
        leases = lease_all(store)
        assert [lease.grant for lease in leases] == [8, 8, 4]
        _, (grant,) = store.append([segment(leases[0], 3, stop="budget")])
        assert grant.tokens == 0
        (refunded,) = lease_all(store)
        assert (refunded.trajectory, refunded.grant) == (leases[0].trajectory, 5)
        assert store.versions_spent() == {0: 3}

    def test_what_one_has_used_is_not_missing_in_the_grant_of_another(self) -> None:
        store = ready_store(grant_tokens=8)
        store.set_quota(quota(tokens=16))
        admit(store)
        leases = lease_all(store)
        assert [grant.tokens for grant in store.append([segment(lease, 4) for lease in leases])[1]] == [4, 4]
        store.append([segment(lease, 4, offset=4) for lease in leases])  # made while the store answered
        assert store.versions_spent() == {0: 16} and assert_exact(store)["overdraft"] == 0

    def test_a_swap_moves_the_reservation_to_the_next_version(self) -> None:
        store = ready_store(grant_tokens=8)
        store.set_quota(quota(tokens=10))
        store.set_quota(quota(1, tokens=5))
        admit(store)
        first, second = lease_all(store)
        assert (first.grant, second.grant) == (8, 2)
        assert store.append([segment(first, 3, next_version=1)])[1][0].tokens == 5
        assert store.append([segment(second, 0)])[1][0].tokens == 7

    def test_segment_budget_waits_for_the_next_version(self) -> None:
        store = ready_store()
        store.set_quota(quota(tokens_per_segment=4))
        admit(store, size=1)
        (lease,) = lease_all(store)
        assert lease.grant == 4
        assert store.append([segment(lease, 4, stop="budget")])[1][0].tokens == 0
        assert lease_all(store) == []
        store.publish(1)
        store.set_quota(quota(1, tokens_per_segment=4))
        (lease,) = lease_all(store, version=1)
        assert (lease.grant, len(lease.prefix)) == (4, 4)
        assert store.append([segment(lease, 1, offset=4, version=1)])[1][0].tokens == 3

    def test_evaluation_first_then_partial_then_oldest(self) -> None:
        store = ready_store()
        admit(store, 0, size=1)
        admit(store, 1, size=1)
        (partial,) = [lease for lease in lease_all(store) if lease.group == 1]
        store.append([segment(partial, 1, stop="budget")])
        admit(store, 2, size=1)
        evaluation = store.admit("eval-0", PROMPT, kind="eval", group_size=1, max_tokens=100)
        leases = lease_all(store)
        assert [lease.group for lease in leases] == [evaluation, 1, 2]
        assert leases[0].grant == 100

    def test_lookahead_0_alternates(self) -> None:
        store = ready_store(lookahead=0)
        admit(store)
        complete(store)
        assert store.claim(1, 0, 0.0).status == "claimed"
        admit(store, 1)
        assert lease_all(store) == []
        store.publish(1, 1)
        store.set_quota(quota(1))
        assert lease_all(store, version=0) == []
        assert len(lease_all(store, version=1)) == 2

    def test_a_waiting_worker_is_woken_by_an_admission(self) -> None:
        store = ready_store()
        answer: list[list[Lease]] = []
        worker = threading.Thread(target=lambda: answer.append(store.lease("worker", 0, 4, 30.0)))
        worker.start()
        admit(store)
        worker.join(timeout=20.0)
        assert len(answer[0]) >= 1


class TestRepeats:
    def test_admit(self) -> None:
        store = ready_store()
        group = admit(store)
        before = snapshot(store)
        assert admit(store) == group
        assert snapshot(store) == before
        with pytest.raises(Conflict, match="other content"):
            admit(store, size=3)

    def test_admit_of_a_group_too_large_to_be_meant(self) -> None:
        store = ready_store()
        with pytest.raises(Conflict, match=r"65537.*at most 65536"):
            admit(store, size=65_537)

    def test_admit_of_a_group_that_is_gone(self) -> None:
        store = ready_store()
        admit(store)
        complete(store)
        store.claim(1, 0, 0.0)
        store.publish(1, 1)
        store.commit(1)
        store.evict(1)
        with pytest.raises(Conflict, match="gone"):
            admit(store)

    def test_append(self) -> None:
        store = ready_store()
        admit(store, max_tokens=6)
        first, second = lease_all(store)
        batch = [segment(first, 3), segment(second, 6)]
        answer = store.append(batch)
        before = snapshot(store)
        assert store.append(batch) == answer
        assert snapshot(store) == before
        changed = segment(first, 3)
        changed.tokens[1] += 1
        with pytest.raises(Conflict, match="other content"):
            store.append([changed])
        with pytest.raises(Conflict, match="gap"):
            store.append([segment(first, 1, offset=4)])
        with pytest.raises(Conflict, match="limit is 6"):
            store.append([segment(first, 4, offset=3)])
        store.publish(2)
        store.append([segment(first, 1, offset=3, version=2)])
        with pytest.raises(Conflict, match="versions never decrease"):
            store.append([segment(first, 1, offset=4, version=1)])

    def test_a_refused_batch_writes_nothing(self) -> None:
        store = ready_store()
        admit(store)
        first, second = lease_all(store)
        before = snapshot(store)
        with pytest.raises(Conflict):
            store.append([segment(first, 3), segment(second, 1, offset=7)])
        assert snapshot(store) == before

    @pytest.mark.parametrize("stop", ["stop", "length", "repetition", "budget", "abort"])
    def test_append_that_ends_a_lease(self, stop: StopReason, tmp_path: Path) -> None:
        store = ready_store(tmp_path)
        admit(store)
        lease = lease_all(store)[0]
        batch = [segment(lease, 2), segment(lease, 1, offset=2, stop=stop)]
        _, grants = store.append(batch)
        assert store.append(batch)[1][1] == grants[1]
        store.close()
        assert open_store(tmp_path).append(batch)[1][1] == Grant(trajectory=lease.trajectory, stale=False, tokens=0)

    def test_score(self) -> None:
        store = ready_store(max_attempts=2)
        admit(store, size=3)
        for lease in lease_all(store):
            store.append([segment(lease, 2, stop="stop")])
        store.score(0, 0, "scored", 1.0, {})
        store.score(1, 0, "infra_failure", 0.0, {})
        before = snapshot(store)
        store.score(0, 0, "scored", 1.0, {})
        store.score(1, 0, "infra_failure", 0.0, {})
        assert snapshot(store) == before
        store.score(0, 0, "scored", 2.0, {})
        store.score(1, 0, "scored", 1.0, {})
        assert (snapshot(store), store.counts().scores_ignored) == (before, 2)
        with pytest.raises(Conflict, match="never asked for"):
            store.score(1, 2, "scored", 1.0, {})
        with pytest.raises(Conflict, match="finite"):
            store.score(2, 0, "scored", float("nan"), {})

    def test_publish_and_quota(self) -> None:
        store = ready_store()
        before = snapshot(store)
        store.publish(0)
        store.set_quota(quota())
        assert snapshot(store) == before
        store.publish(3)
        with pytest.raises(Conflict, match="publish 4 or higher"):
            store.publish(2)

    def test_claim_commit_uncommit_and_evict(self) -> None:
        store = ready_store()
        admit(store)
        complete(store)
        claim = store.claim(1, 0, 0.0)
        assert store.claim(1, 0, 0.0) == claim
        with pytest.raises(Conflict, match="iteration 1 is untrained"):
            store.claim(2, 0, 0.0)
        with pytest.raises(Conflict, match="untrained"):
            store.commit(1)
        store.publish(1, 1)
        store.publish(1, 1)
        store.commit(1)
        before = snapshot(store)
        store.commit(1)
        assert store.uncommit(1) == []
        assert snapshot(store) == before
        assert (store.evict(1), store.evict(1)) == (1, 0)
        with pytest.raises(Conflict, match="evicted"):
            store.uncommit(0)
        with pytest.raises(Conflict, match="not above"):
            store.claim(1, 1, 0.0)


class TestClaims:
    def two_versions(self, **settings: Any) -> TrajectoryStore:
        """One ready group, two members: 3 tokens of version 0 then 2 of version 3; and 4 tokens of version 0."""
        store = ready_store(**settings)
        admit(store)
        first, second = lease_all(store)
        store.append([segment(first, 3, next_version=3)])
        store.publish(3)
        store.append([segment(first, 2, offset=3, version=3, stop="stop"), segment(second, 4, stop="stop")])
        score_all(store)
        return store

    def test_over_age_tokens_are_masked(self) -> None:
        store = self.two_versions(max_staleness=2)
        assert store.claim(1, 3, 0.0).status == "claimed"
        batch = store.read_claim(1)
        old, new = int(Mask.GENERATED | Mask.OVER_AGE), int(Mask.GENERATED | Mask.TRAINED)
        assert batch.mask.tolist() == [0] * 3 + [old] * 3 + [new] * 2 + [0] * 3 + [old] * 4
        ledger = assert_exact(store)
        assert (ledger["claimed"], ledger["masked_over_age"]) == (2, 7)

    def test_tokens_at_the_bound_are_trained(self) -> None:
        store = self.two_versions(max_staleness=3)
        store.claim(1, 3, 0.0)
        assert store.ledger()["claimed"] == 9

    def test_current_only_masks_older_segments(self) -> None:
        store = self.two_versions(max_staleness=None, segment_loss="current_only")
        store.claim(1, 3, 0.0)
        batch = store.read_claim(1)
        older, new = int(Mask.GENERATED | Mask.SEGMENT), int(Mask.GENERATED | Mask.TRAINED)
        assert batch.mask.tolist() == [0] * 3 + [older] * 3 + [new] * 2 + [0] * 3 + [new] * 4
        assert assert_exact(store)["masked_segment"] == 3

    def test_uncommit_moves_everything_back(self, tmp_path: Path) -> None:
        store = self.two_versions(path=tmp_path, max_staleness=2)
        before, groups = store.ledger(), list(store.groups())
        store.claim(1, 3, 0.0)
        masks = store.read_claim(1).mask.tolist()
        store.publish(4, 1, {"veto": [0]})
        store.commit(1)
        store.close()
        store = open_store(tmp_path, max_staleness=2)
        assert store.uncommit(0) == [1]
        assert (store.ledger(), list(store.groups())) == (before, groups)
        assert store.counts().version == 4
        store.claim(1, 3, 0.0)
        assert store.read_claim(1).mask.tolist() == masks

    def test_a_group_without_a_trainable_token_is_evicted(self) -> None:
        store = ready_store(max_staleness=2)
        admit(store)
        complete(store)
        store.publish(3)
        assert store.claim(1, 3, 0.0).status == "starved"
        assert assert_exact(store)["evicted_over_age"] == 8
        assert list(store.groups()) == []

    def test_failed_members_are_left_out(self) -> None:
        store = ready_store(max_attempts=1)
        admit(store, size=3)
        for lease in lease_all(store):
            store.append([segment(lease, 2, stop="stop")])
        store.score(0, 0, "infra_failure", 0.0, {})
        score_all(store)
        store.claim(1, 0, 0.0)
        assert store.read_claim(1).trajectories.tolist() == [1, 2]
        ledger = assert_exact(store)
        assert (ledger["claimed"], ledger["evicted_failed"]) == (4, 2)

    def test_a_group_with_too_few_members_is_evicted(self) -> None:
        store = ready_store(max_attempts=1)
        admit(store)
        for lease in lease_all(store):
            store.append([segment(lease, 2, stop="stop")])
        store.score(0, 0, "infra_failure", 0.0, {})
        store.score(1, 0, "scored", 1.0, {})
        assert assert_exact(store)["evicted_min_group_size"] == 4
        assert store.counts().groups_untrained == 0

    def test_an_exhausted_budget_starves_at_once_and_trains_what_is_ready(self) -> None:
        store = ready_store(groups_per_iteration=2)
        store.set_quota(quota(tokens=8))
        admit(store, 0)
        admit(store, 1)
        leases = lease_all(store)
        assert [lease.grant for lease in leases] == [8]
        assert store.claim(1, 0, 0.0).status == "timeout"
        store.append([segment(leases[0], 8, stop="budget")])
        assert store.claim(1, 0, 30.0).status == "starved"
        store.set_quota(quota(tokens=24))
        for lease in lease_all(store):
            if lease.group == 0:
                store.append([segment(lease, 16 - len(lease.prefix), offset=len(lease.prefix), stop="stop")])
        for _ in range(2):
            for lease in lease_all(store):
                store.append([segment(lease, lease.grant, offset=len(lease.prefix), stop="stop")])
        score_all(store)
        assert store.claim(1, 0, 30.0).status in {"claimed", "starved"}
        assert_exact(store)

    def test_a_waiting_claim_is_woken_by_the_last_score(self) -> None:
        store = ready_store()
        admit(store)
        for lease in lease_all(store):
            store.append([segment(lease, 2, stop="stop")])
        items = store.unscored(10, 60.0, 0.0)
        answers: list[str] = []
        learner = threading.Thread(target=lambda: answers.append(store.claim(1, 0, 60.0).status))
        learner.start()
        for item in items:
            store.score(item.trajectory, item.attempt, "scored", 1.0, {})
        learner.join(timeout=20.0)
        assert answers == ["claimed"]

    def test_a_waiting_claim_is_woken_by_an_expiring_lease(self) -> None:
        store = ready_store(lease_ttl_s=0.2)
        store.set_quota(quota(tokens=1))
        admit(store)
        (lease,) = lease_all(store)
        store.append([segment(lease, 1)])
        assert store.claim(1, 0, 30.0).status == "starved"

    def test_closing_wakes_waiters(self) -> None:
        store = ready_store()
        admit(store)
        lease_all(store)
        failures: list[Exception] = []
        started = threading.Event()

        def wait() -> None:
            started.set()
            try:
                store.claim(1, 0, 60.0)
            except StoreError as error:
                failures.append(error)

        learner = threading.Thread(target=wait)
        learner.start()
        started.wait()
        store.close()
        store.close()
        learner.join(timeout=20.0)
        assert len(failures) == 1
        with pytest.raises(StoreError, match="closed"):
            store.counts()


class TestEvaluation:
    def test_results_and_drop(self) -> None:
        store = ready_store(max_attempts=1)
        for number in range(2):
            store.admit(f"eval-1-{number}", PROMPT, kind="eval", group_size=1, max_tokens=9)
        assert store.eval_results("eval-1-", 0.0) is None
        assert store.counts().eval_pending == 2
        first, second = lease_all(store)
        store.publish(1)
        store.append([segment(first, 2, next_version=1), segment(first, 7, offset=2, version=1)])
        store.append([segment(second, 1, stop="stop")])
        store.score(first.trajectory, 0, "scored", 0.25, {})
        store.score(second.trajectory, 0, "infra_failure", 0.0, {})
        results = store.eval_results("eval-1-", 0.0)
        assert results is not None
        assert [(r.reward, r.length, r.stop, r.first_version, r.last_version) for r in results] == [
            (0.25, 9, Stop.LENGTH, 0, 1),
            (None, 1, Stop.STOP, 0, 0),
        ]
        assert (store.ledger()["generated"], store.ledger()["eval"]) == (0, 10)
        assert store.versions_spent() == {0: 0}
        assert store.claim(1, 0, 0.0).status == "starved"
        assert (store.drop_eval("eval-1-"), store.drop_eval("eval-1-")) == (2, 0)
        store.admit("eval-1-0", PROMPT, kind="eval", group_size=1, max_tokens=9)

    def test_dropping_fences_the_workers(self) -> None:
        store = ready_store()
        store.admit("eval-0", PROMPT, kind="eval", group_size=1, max_tokens=9)
        (lease,) = lease_all(store)
        store.drop_eval("eval-")
        assert store.append([segment(lease, 1)])[1][0].stale


class TestAdmission:
    def test_the_quota_of_groups(self) -> None:
        store = ready_store()
        store.set_quota(quota(groups=1))
        admit(store)
        with pytest.raises(StoreFull, match="limit is 1"):
            admit(store, 1)
        assert store.counts().next_cursor == 1

    def test_the_size_limit_refuses_only_admission(self) -> None:
        store = ready_store(max_bytes=20_000)
        admit(store, size=2, max_tokens=400)
        with pytest.raises(StoreFull, match="max_bytes"):
            admit(store, 1, size=2, max_tokens=400)
        complete(store, count=60)
        store.claim(1, 0, 0.0)
        admit(store, 1, size=2, max_tokens=100)

    def test_user_errors_are_value_errors(self) -> None:
        with pytest.raises(ValueError, match='durability is "some"'):
            open_store(durability="some")
        with pytest.raises(ValueError, match="timeout_s"):
            open_store().lease("worker", 0, 1, -1.0)


class TestFiles:
    def test_evicted_files_are_deleted(self, tmp_path: Path) -> None:
        store = ready_store(tmp_path, file_bytes=4096, durability="os")
        largest = 0
        for iteration in range(1, 40):
            admit(store, iteration - 1, max_tokens=60)
            complete(store, count=60, version=iteration - 1)
            assert store.claim(iteration, iteration - 1, 0.0).status == "claimed"
            store.publish(iteration, iteration)
            store.set_quota(quota(iteration))
            store.commit(iteration)
            store.evict(iteration)
            largest = max(largest, store.counts().bytes)
        assert largest < 6 * 4096
        ledger = assert_exact(store)
        store.close()
        store = open_store(tmp_path)
        assert store.ledger() == ledger
        assert store.counts().next_cursor == 39

    def test_one_writer(self, tmp_path: Path) -> None:
        store = open_store(tmp_path)
        with pytest.raises(StoreLocked):
            open_store(tmp_path)
        store.close()
        open_store(tmp_path).close()

    def test_damage_is_located(self, tmp_path: Path) -> None:
        store = ready_store(tmp_path, file_bytes=65536)
        for number in range(4):
            admit(store, number)
        store.close()
        (log,) = [path for path in tmp_path.iterdir() if b"train-1" in path.read_bytes()]
        data = bytearray(log.read_bytes())
        data[data.index(b"train-1")] ^= 0xFF
        log.write_bytes(data)
        with pytest.raises(CorruptLog, match=log.name):
            open_store(tmp_path)


CHILD = """
import sys
import numpy as np
from tests.support.filled_store import admit, lease_all, open_store, quota, segment
store = open_store(sys.argv[1], durability="os", file_bytes=16384)
if store.counts().version < 0:
    store.publish(0)
store.set_quota(quota(groups=100000, tokens=10**9))
while True:
    counts = store.counts()
    if counts.trajectories_idle < 2:
        admit(store, counts.next_cursor, max_tokens=50)
    for lease in store.lease("worker", 0, 4, 0.0):
        offset, stop = len(lease.prefix), None
        while stop is None:
            stop = "stop" if offset >= 40 else None
            store.append([segment(lease, 5, offset=offset, stop=stop)])
            offset += 5
            print(lease.trajectory, offset, flush=True)
"""


def test_kill_loses_nothing_acknowledged_at_level_os(tmp_path: Path) -> None:
    acknowledged: dict[int, int] = {}
    for kill in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert child.stdout is not None
        for _ in range(50 + 37 * kill):
            trajectory, length = map(int, child.stdout.readline().split())
            acknowledged[trajectory] = length
        child.send_signal(signal.SIGKILL)
        for line in child.stdout:
            if line.endswith("\n"):
                trajectory, length = map(int, line.split())
                acknowledged[trajectory] = length
        child.wait()
        child.stdout.close()

        store = open_store(tmp_path, durability="os", file_bytes=16384)
        ledger = assert_exact(store)
        total = 0
        for group in store.groups():
            for trajectory in group["trajectories"]:
                tokens = store.trajectory(trajectory)["tokens"]
                assert tokens.tolist() == [100 * trajectory + i for i in range(len(tokens))]
                assert len(tokens) >= acknowledged.get(trajectory, 0)
                total += len(tokens)
        assert ledger["generated"] == total
        assert [group["cursor"] for group in store.groups()] == list(range(store.counts().next_cursor))
        store.close()
