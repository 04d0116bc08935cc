"""The step plan of a claim: dealt where the claim is read, trained by, archived with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.metrics.spans import SpanBuffer
from pmdflow.store import Conflict, StoreSettings
from pmdflow.store.actor import StoreActor
from pmdflow.store.archive import parts, read_part
from pmdflow.store.archive.claims import archive_claims
from pmdflow.store.plan import by_length, in_claim_order
from pmdflow.types import ClaimPlan, Mask, Prompt, Quota, Segment

PROMPT = Prompt(id="p", text="?", tokens=np.array([5, 6], np.int32))
SETTINGS: StoreSettings = {"groups_per_iteration": 3, "lookahead": 0, "max_staleness": 4, "durability": "os"}
STEPS, SEED = 2, 5


@given(num_groups=st.integers(0, 40), num_steps=st.integers(1, 9))
def test_claim_order_deals_every_group_evenly_and_in_order(num_groups: int, num_steps: int) -> None:
    plan = in_claim_order(num_groups, num_steps)
    assert len(plan.steps) == num_groups and plan.num_steps == num_steps
    assert (np.diff(plan.steps) >= 0).all()
    sizes = np.bincount(plan.steps, minlength=num_steps)
    assert len(sizes) == num_steps and sizes.max() - sizes.min() <= 1


@given(lengths=st.lists(st.integers(0, 9), max_size=40), num_steps=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_stratum_of_length_gives_each_step_one_group(lengths: list[int], num_steps: int, seed: int) -> None:
    plan = by_length(np.array(lengths, np.int64), num_steps, seed=seed, iteration=3)
    assert plan.num_steps == num_steps and plan.seed == seed
    longest_first = plan.steps[np.argsort(-np.array(lengths), kind="stable")]
    for begin in range(0, len(lengths), num_steps):
        stratum = longest_first[begin : begin + num_steps]
        assert len(set(stratum.tolist())) == len(stratum) and set(stratum.tolist()) <= set(range(num_steps))
    again = by_length(np.array(lengths, np.int64), num_steps, seed=seed, iteration=3)
    assert np.array_equal(plan.steps, again.steps)


def test_over_the_iterations_every_group_is_equally_likely_in_every_step() -> None:
    lengths, num_steps, draws = np.array([448, 30, 200, 31, 29, 90, 33]), 3, 3000
    seen = np.zeros((len(lengths), num_steps))
    for iteration in range(draws):
        seen[np.arange(len(lengths)), by_length(lengths, num_steps, seed=1, iteration=iteration).steps] += 1
    deviation = np.sqrt(draws * (1 / num_steps) * (1 - 1 / num_steps))
    assert np.abs(seen - draws / num_steps).max() < 5 * deviation


def claimed(directory: Path) -> StoreActor:
    """Three groups of one token a trajectory, claimed."""
    actor = StoreActor(directory=str(directory / "store"), settings=SETTINGS, steps_per_iteration=STEPS, seed=SEED)
    actor.publish(0, None, {})
    actor.set_quota(Quota(version=0, groups=3, tokens=100, tokens_per_segment=None))
    assert actor.admit([(f"train-{number}", number, PROMPT) for number in range(3)], "train", 2, 4) == [0, 1, 2]
    for lease in actor.lease("worker", 0, 6, 0.0):
        actor._store.append([Segment(
            trajectory=lease.trajectory, epoch=lease.epoch, offset=0, version=0, temperature=1.0,
            tokens=np.array([7], np.int32), logprobs=np.array([-1.0], np.float32), next_version=0, stop="stop",
        )])  # fmt: skip
    actor.score([(item.trajectory, item.attempt, "scored", 1.0, {}) for item in actor.unscored(6, 60.0, 0.0)])
    assert actor.claim(1, 0, 0.0).status == "claimed"
    return actor


def reopened(directory: Path, steps_per_iteration: int) -> StoreActor:
    return StoreActor(
        directory=str(directory / "store"), settings=SETTINGS, steps_per_iteration=steps_per_iteration, seed=6
    )


def test_an_undone_claim_is_dealt_as_it_was_recorded(tmp_path: Path) -> None:
    actor = claimed(tmp_path)
    plan = actor.read_rows(1).plan
    assert plan is not None
    actor.close()
    for steps in (1, 3):
        actor = reopened(tmp_path, steps)
        actor.uncommit(0)
        assert actor.claim(1, 0, 0.0).status == "claimed"
        again = actor.read_rows(1).plan
        assert again is not None
        assert (again.steps.tolist(), again.num_steps, again.rule) == (plan.steps.tolist(), 2, plan.rule)
        actor.close()


def test_a_plan_is_recorded_once_and_is_of_the_claim(tmp_path: Path) -> None:
    actor = claimed(tmp_path)
    store = actor._store
    assert store.plan(1) is None
    plan = ClaimPlan(steps=np.array([1, 0, 1], np.int32), num_steps=2, rule="drawn", seed=2**40)
    for wrong in (replace(plan, steps=plan.steps[1:]), replace(plan, num_steps=1), replace(plan, rule="")):
        with pytest.raises(Conflict, match="plan of iteration 1"):
            store.record_plan(1, wrong)
    store.record_plan(1, plan)
    store.record_plan(1, plan)
    with pytest.raises(Conflict, match="another plan"):
        store.record_plan(1, in_claim_order(3, 2))
    with pytest.raises(Conflict, match="no claim"):
        store.record_plan(2, plan)
    read = actor.read_rows(1).plan
    assert read is not None
    assert (read.steps.tolist(), read.num_steps, read.rule, read.seed) == ([1, 0, 1], 2, "drawn", 2**40)
    store.publish(1, 1)
    store.uncommit(0)
    store.discard(1, "its answer is wrong")
    store.claim(1, 1, 0.0)
    without = store.plan(1)
    assert without is not None
    assert (without.steps.tolist(), without.num_steps) == ([1, 1], 2)
    actor.close()


def test_a_claim_is_handed_out_and_archived_with_its_plan(tmp_path: Path) -> None:
    actor = claimed(tmp_path)
    plan = actor.read_rows(1).plan
    assert plan is not None
    assert (plan.num_steps, plan.rule, plan.seed) == (2, "length_strata", 5)
    assert sorted(plan.steps.tolist()) in ([0, 0, 1], [0, 1, 1])
    actor.publish(1, 1, {})
    actor.commit(1)
    spans = SpanBuffer("archive")
    archive_claims(tmp_path / "store", tmp_path, [1], attrs={}, steps_per_iteration=STEPS, spans=spans)
    assert actor.evict(1) == 3
    actor.close()
    assert [span["name"] for span in spans.drain()] == ["archive"]
    (part,) = parts(tmp_path)
    archived = read_part(part).plan
    assert archived is not None
    assert (archived.steps.tolist(), archived.num_steps, archived.rule, archived.seed) == (
        plan.steps.tolist(), plan.num_steps, plan.rule, plan.seed,
    )  # fmt: skip


def test_what_is_archived_is_not_read_again_but_a_claim_made_anew_is(tmp_path: Path) -> None:
    """Beside the store that is open: the archive asks it nothing, and leaves it nothing to wait for."""
    actor, spans = claimed(tmp_path), SpanBuffer("archive")

    def archive() -> int:
        archive_claims(tmp_path / "store", tmp_path, [1], attrs={}, steps_per_iteration=STEPS, spans=spans)
        return len(spans.drain())

    actor.publish(1, 1, {})
    actor.commit(1)
    before = actor.counts().lsn
    assert (archive(), archive()) == (1, 0)
    assert actor.counts().lsn == before
    actor.uncommit(0)  # as a resume from an older checkpoint does
    assert actor.claim(1, 1, 0.0).status == "claimed"
    actor.publish(2, 1, {"veto": [0]})
    actor.commit(1)
    assert archive() == 1
    (part,) = parts(tmp_path)
    assert (read_part(part).mask == Mask.GENERATED | Mask.VETO).sum() == 1
    actor.evict(1)
    with pytest.raises(Conflict, match="no claim"):
        archive()
    actor.close()
