"""The scheduler over the real store under a virtual clock: every run ends, within its budgets."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmdflow.errors import PmdflowError
from pmdflow.run.scheduler import SchedulerSettings, next_quota
from pmdflow.run.simulation import EngineModel, LearnerModel, LognormalLengths, Simulation, SimulationSettings
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


@st.composite
def workloads(draw: st.DrawFn) -> SimulationSettings:
    lookahead = draw(st.integers(0, 3))
    groups = draw(st.integers(1, 4))
    median = draw(st.floats(1.0, 60.0))
    return SimulationSettings(
        scheduler=SchedulerSettings(
            groups_per_iteration=groups,
            tokens_per_iteration=draw(st.integers(1, 300)),
            tokens_per_segment=draw(st.none() | st.integers(1, 40)),
            lookahead=lookahead,
            iteration_s=draw(st.none() | st.floats(0.01, 50.0)),
            least_tokens=draw(st.integers(1, 20)),
        ),
        max_staleness=draw(st.none() | st.integers(lookahead, lookahead + 3)),
        window=draw(st.none() | st.integers(groups, 3 * groups)),
        iterations=draw(st.integers(1, 4)),
        group_size=draw(st.integers(1, 4)),
        max_tokens=draw(st.integers(1, 80)),
        lengths=LognormalLengths(median=median, p99=median * draw(st.floats(1.1, 20.0))),
        engine=EngineModel(
            slots=draw(st.integers(1, 8)),
            step_s=draw(st.sampled_from([0.0, 0.01, 0.5])),
            context_s=draw(st.sampled_from([0.0, 0.01])),
            prefill_s=draw(st.sampled_from([0.0, 0.1])),
            apply_s=draw(st.sampled_from([0.0, 1.0])),
        ),
        learner=LearnerModel(
            iteration_s=draw(st.sampled_from([0.0, 3.0])),
            token_s=draw(st.sampled_from([0.0, 0.01])),
            publish_s=draw(st.sampled_from([0.0, 1.0])),
        ),
        actors=draw(st.integers(1, 3)),
        score_s=draw(st.sampled_from([0.0, 0.7])),
        grant_tokens=draw(st.sampled_from([1, 7, 64])),
        lost_share=draw(st.sampled_from([0.0, 0.0, 0.02])),
        infra_failure_share=draw(st.sampled_from([0.0, 0.0, 0.2])),
        refill_limit=draw(st.none() | st.integers(1, 3)),
        no_signal_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=draw(st.integers(0, 1000)),
    )


@given(workloads())
@settings(max_examples=150)
def test_every_run_ends_and_keeps_its_bounds(workload: SimulationSettings) -> None:
    try:
        report = Simulation(workload).run(max_events=1_000_000)
    except PmdflowError:
        assert workload.refill_limit is not None, "only groups without a signal end a run early"
        return
    scheduler = workload.scheduler
    assert len(report.iterations) == workload.iterations
    assert report.overspent_tokens <= 0
    assert report.max_groups_untrained <= scheduler.active_groups
    stalest = max(iteration.staleness_max for iteration in report.iterations)
    if workload.max_staleness is not None:
        assert stalest <= workload.max_staleness
    if workload.window is not None:
        assert max(iteration.passed for iteration in report.iterations) < workload.window
        if not report.short_claims:
            ahead = -(-(workload.window - 1) // scheduler.groups_per_iteration)
            assert stalest <= scheduler.lookahead + ahead
    outside = {"generated", "prompt", "reprefill", "eval", "overdraft"}
    assert report.ledger["generated"] == sum(n for place, n in report.ledger.items() if place not in outside)
    assert report.ledger["trained"] == sum(iteration.trained for iteration in report.iterations)
    assert report.ledger.get("overdraft", 0) == 0
    waited = report.busy_s + sum(report.waits_s.values())
    assert waited <= report.seconds * workload.actors + 1e-6


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@given(workloads())
@settings(max_examples=20_000)
def test_every_run_ends_and_keeps_its_bounds_in_the_long_form(workload: SimulationSettings) -> None:
    test_every_run_ends_and_keeps_its_bounds.hypothesis.inner_test(workload)  # type: ignore[attr-defined]


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
