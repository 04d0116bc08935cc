"""The scheduler over the real store under a virtual clock."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.errors import PmdflowError
from pmdflow.run.scheduler import SchedulerSettings, next_quota
from pmdflow.run.simulation import (
    EngineModel,
    LearnerModel,
    LognormalLengths,
    SimulatedIteration,
    Simulation,
    SimulationSettings,
)
from pmdflow.types import Counts

SCHEDULER = SchedulerSettings(groups_per_iteration=2, tokens_per_iteration=300, tokens_per_segment=None, lookahead=1)
WORKLOAD = SimulationSettings(
    scheduler=SCHEDULER,
    max_staleness=4,
    iterations=4,
    group_size=3,
    max_tokens=60,
    lengths=LognormalLengths(median=15, p99=90),
    engine=EngineModel(slots=4, step_s=0.125),
    learner=LearnerModel(iteration_s=4.0),
)


def counts(**values: int) -> Counts:
    return Counts(**{**dict.fromkeys(Counts.__slots__, 0), **values})


def test_a_narrower_window_is_passed_less_and_keeps_tokens_younger() -> None:
    tail = replace(
        WORKLOAD,
        scheduler=SchedulerSettings(
            groups_per_iteration=4, tokens_per_iteration=10**6, tokens_per_segment=None, lookahead=3
        ),
        max_staleness=None,
        iterations=60,
        max_tokens=1000,
        lengths=LognormalLengths(median=20, p99=600),
        engine=EngineModel(slots=48, step_s=0.05),
        learner=LearnerModel(iteration_s=2.0),
    )
    passed, stalest = [], []
    for window in (4, 8, 16, None):
        steady = Simulation(replace(tail, window=window)).run().steady(skip=8)
        passed.append(steady.passed)
        stalest.append(steady.staleness_max)
        if window is not None:
            assert steady.passed < window
            assert steady.staleness_max <= 3 + -(-(window - 1) // 4)
    assert passed[0] < passed[1] < passed[-1], passed
    assert stalest[0] < stalest[-1], stalest


def test_claims_are_full_of_groups_with_a_signal_if_others_are_refilled() -> None:
    ample = replace(SCHEDULER, tokens_per_iteration=10**6)
    dull = replace(WORKLOAD, scheduler=ample, group_size=8, no_signal_share=0.6, iterations=12)
    plain, refilled = (Simulation(replace(dull, refill_limit=limit)).run() for limit in (None, 8))
    assert plain.short_claims == refilled.short_claims == 0
    assert plain.ledger["evicted_no_signal"] == 0 < refilled.ledger["evicted_no_signal"]
    assert refilled.ledger["trained"] > 0 and refilled.ledger["masked_filter"] == 0


class Drawing(Simulation):
    """Counts the groups that are drawn in each iteration."""

    drawn: tuple[int, ...] = (0,)

    def _publish(self, done: SimulatedIteration, now: float) -> None:
        before = self._store.counts().next_cursor - sum(self.drawn)
        super()._publish(done, now)
        self.drawn = (*self.drawn, before)


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_groups_are_drawn_in_place_of_others_than_an_iteration_may(limit: int) -> None:
    far = replace(SCHEDULER, lookahead=3, tokens_per_iteration=10**6)
    dull = replace(WORKLOAD, scheduler=far, max_staleness=None, group_size=8, no_signal_share=0.8, iterations=12)
    simulation = Drawing(replace(dull, refill_limit=limit))
    with contextlib.suppress(PmdflowError):
        simulation.run()
    first, *others = simulation.drawn[1:]
    assert first <= 8 + 2 * limit and len(others) > 1
    assert max(others) == 2 + 2 * limit, "those in the place of the trained, and of as many others as may be"


def test_a_task_without_any_signal_ends_the_run_and_says_so() -> None:
    with pytest.raises(PmdflowError, match="without a signal"):
        Simulation(replace(WORKLOAD, no_signal_share=1.0, refill_limit=2)).run()


def test_a_budget_smaller_than_one_group_is_granted_again_until_the_group_is_ready() -> None:
    workload = replace(
        WORKLOAD,
        scheduler=SchedulerSettings(
            groups_per_iteration=1, tokens_per_iteration=5, tokens_per_segment=None, lookahead=0
        ),
        max_staleness=None,
        iterations=2,
        group_size=2,
        max_tokens=20,
        lengths=LognormalLengths(median=1000, p99=1100),
    )
    report = Simulation(workload).run()
    assert report.regrants >= 6  # 40 tokens an iteration, 5 at a grant


def test_one_version_a_trajectory_and_no_deadlock_with_fewer_actors_than_versions() -> None:
    ample = replace(SCHEDULER, tokens_per_iteration=10**6, lookahead=2)
    tail = replace(
        WORKLOAD, scheduler=ample, iterations=30, max_tokens=400, lengths=LognormalLengths(median=15, p99=400)
    )
    assert Simulation(replace(tail, actors=3)).run().mixed_version > 0
    for actors in (1, 2, 3):
        dora = replace(tail, scheduler=replace(ample, versions=3), actors=actors, lost_share=0.02, drain=True)
        report = Simulation(dora).run()
        assert report.mixed_version == 0 and report.max_versions <= 3 and report.groups_left == 0
        assert max(iteration.staleness_max for iteration in report.iterations) <= 4
    assert report.max_versions == 3


def test_with_more_groups_than_an_iteration_needs_nobody_waits_for_the_longest_answers() -> None:
    ample = replace(SCHEDULER, tokens_per_iteration=10**6, lookahead=0, groups_per_iteration=8)
    tail = replace(
        WORKLOAD, scheduler=ample, iterations=30, max_tokens=400, lengths=LognormalLengths(median=15, p99=400),
        max_staleness=None, engine=EngineModel(slots=12, step_s=0.125),
    )  # fmt: skip
    alone = Simulation(tail).run()
    april = Simulation(replace(tail, scheduler=replace(ample, extra_groups=8))).run()
    assert april.max_groups_untrained == 16 and april.mixed_version > 0 == alone.mixed_version
    assert april.steady(skip=4).groups_per_s > 1.3 * alone.steady(skip=4).groups_per_s


def test_the_first_quota_of_a_version_is_one_budget() -> None:
    scheduler = SchedulerSettings(groups_per_iteration=4, tokens_per_iteration=100, tokens_per_segment=7, lookahead=2)
    quota = next_quota(scheduler, counts(version=3))
    assert (quota.version, quota.groups, quota.tokens, quota.tokens_per_segment) == (3, 12, 100, 7)


@pytest.mark.parametrize("grants", [1, 2, 5])
def test_a_repeated_grant_raises_both_budgets(grants: int) -> None:
    scheduler = SchedulerSettings(groups_per_iteration=4, tokens_per_iteration=100, tokens_per_segment=7, lookahead=0)
    quota = next_quota(scheduler, counts(version=1, tokens_budget=100 * grants))
    assert (quota.tokens, quota.tokens_per_segment) == (100 * (grants + 1), 7 * (grants + 1))


def test_lookahead_zero_never_trains_a_stale_token_without_segments() -> None:
    scheduler = SchedulerSettings(
        groups_per_iteration=2, tokens_per_iteration=10_000, tokens_per_segment=None, lookahead=0
    )
    report = Simulation(replace(WORKLOAD, scheduler=scheduler, max_staleness=0, iterations=5)).run()
    assert max(iteration.staleness_max for iteration in report.iterations) == 0
    assert report.ledger.get("masked_over_age", 0) == 0


def test_the_same_seed_gives_the_same_run() -> None:
    scheduler = replace(SCHEDULER, tokens_per_segment=16)
    workload = replace(WORKLOAD, scheduler=scheduler, lost_share=0.02)
    first, second = (dataclasses.asdict(Simulation(workload).run()) for _ in range(2))
    assert first == second


def test_time_is_that_of_the_models() -> None:
    """One worker, one slot: every second is decoding, a pause for weights, or waiting for the learner."""
    workload = replace(
        WORKLOAD,
        scheduler=SchedulerSettings(
            groups_per_iteration=1, tokens_per_iteration=10**6, tokens_per_segment=None, lookahead=0
        ),
        max_staleness=0,
        iterations=3,
        group_size=2,
        max_tokens=40,
        lengths=LognormalLengths(median=1000, p99=1100),  # cut at 40
        engine=EngineModel(slots=1, step_s=0.25, prefill_s=0.5, apply_s=2.0),
        learner=LearnerModel(iteration_s=3.0, token_s=0.1, publish_s=1.0),
    )
    report = Simulation(workload).run()
    generation = 2 * (40 * 0.25 + 3 * 0.5)
    training = 3.0 + 0.1 * 2 * 43 + 1.0
    assert report.seconds == pytest.approx(3 * (generation + training) + 2 * 2.0)
    assert report.waits_s["training"] == pytest.approx(3 * training)
    assert report.busy_s == pytest.approx(3 * 2 * 40 * 0.25)


@given(
    rates=st.lists(st.floats(1e-6, 1e9), max_size=8),
    iteration_s=st.floats(1e-3, 1e6),
    least=st.integers(1, 10**6),
    more=st.integers(0, 10**9),
)
def test_an_automatic_budget_lies_between_the_least_and_the_most(
    rates: list[float], iteration_s: float, least: int, more: int
) -> None:
    given_settings = replace(SCHEDULER, tokens_per_iteration=least + more, iteration_s=iteration_s, least_tokens=least)
    found = given_settings.budgeted(rates).tokens_per_iteration
    assert least <= found <= least + more
    assert given_settings.budgeted([]) == given_settings
    newest = sorted(rates[-5:])
    if newest and least < found < least + more:
        assert newest[0] * iteration_s - 1 <= found <= newest[-1] * iteration_s + 1


def test_an_automatic_budget_holds_the_time_of_an_iteration() -> None:
    """Claims that would take 8 s each take about the target; a target that is longer holds nothing back."""
    natural = replace(
        WORKLOAD, scheduler=replace(SCHEDULER, groups_per_iteration=16, tokens_per_iteration=10**6, lookahead=0),
        iterations=30, learner=LearnerModel(iteration_s=0.1), lengths=LognormalLengths(median=25, p99=50),
    )  # fmt: skip
    free_s = Simulation(natural).run().steady(skip=6).iteration_s
    for target_s in (free_s / 3, free_s * 3):
        settings_ = replace(natural, scheduler=replace(natural.scheduler, iteration_s=target_s, least_tokens=48))
        report = Simulation(settings_).run()
        assert report.overspent_tokens <= 0
        assert report.steady(skip=6).iteration_s == pytest.approx(min(target_s, free_s), rel=0.2)
