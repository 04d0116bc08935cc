"""The scheduler over the real store under a virtual clock: every run ends, within its budgets."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmdflow.run.scheduler import SchedulerSettings, next_quota
from pmdflow.run.simulation import Simulation, SimulationSettings
from pmdflow.types import Counts

MAX_TICKS = 200_000


def counts(**values: int) -> Counts:
    return Counts(**{**dict.fromkeys(Counts.__slots__, 0), **values})


@st.composite
def workloads(draw: st.DrawFn) -> SimulationSettings:
    lookahead = draw(st.integers(0, 3))
    bounded = draw(st.booleans())
    return SimulationSettings(
        scheduler=SchedulerSettings(
            groups_per_iteration=draw(st.integers(1, 4)),
            tokens_per_iteration=draw(st.integers(1, 300)),
            tokens_per_segment=draw(st.none() | st.integers(1, 40)),
            lookahead=lookahead,
        ),
        max_staleness=lookahead + draw(st.integers(0, 3)) if bounded else None,
        iterations=draw(st.integers(1, 4)),
        group_size=draw(st.integers(1, 4)),
        max_tokens=draw(st.integers(1, 80)),
        mean_tokens=draw(st.floats(1.0, 60.0)),
        actors=draw(st.integers(1, 3)),
        slots=draw(st.integers(1, 8)),
        tokens_per_tick=draw(st.integers(1, 16)),
        train_ticks=draw(st.integers(0, 6)),
        lost_share=draw(st.sampled_from([0.0, 0.0, 0.05])),
        infra_failure_share=draw(st.sampled_from([0.0, 0.0, 0.2])),
        seed=draw(st.integers(0, 1000)),
    )


@given(workloads())
@settings(max_examples=150)
def test_every_run_ends_and_keeps_its_bounds(workload: SimulationSettings) -> None:
    report = Simulation(workload).run(max_ticks=MAX_TICKS)
    scheduler = workload.scheduler
    assert report.iterations == workload.iterations
    assert report.overspent_tokens <= 0
    assert report.max_groups_untrained <= scheduler.groups_per_iteration * (scheduler.lookahead + 1)
    if workload.max_staleness is not None:
        assert report.max_trained_staleness <= workload.max_staleness
    outside = {"generated", "prompt", "reprefill", "eval", "overdraft"}
    assert report.ledger["generated"] == sum(n for place, n in report.ledger.items() if place not in outside)
    assert report.ledger["trained"] == report.trained_tokens


def test_a_budget_smaller_than_one_group_is_granted_again_until_the_group_is_ready() -> None:
    workload = SimulationSettings(
        scheduler=SchedulerSettings(
            groups_per_iteration=1, tokens_per_iteration=5, tokens_per_segment=None, lookahead=0
        ),
        max_staleness=None,
        iterations=2,
        group_size=2,
        max_tokens=20,
        mean_tokens=1000.0,
    )
    report = Simulation(workload).run(max_ticks=MAX_TICKS)
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
    workload = SimulationSettings(
        scheduler=SchedulerSettings(
            groups_per_iteration=2, tokens_per_iteration=10_000, tokens_per_segment=None, lookahead=0
        ),
        max_staleness=0,
        iterations=5,
        group_size=3,
        max_tokens=50,
        mean_tokens=20.0,
    )
    report = Simulation(workload).run(max_ticks=MAX_TICKS)
    assert report.max_trained_staleness == 0
    assert report.ledger.get("masked_over_age", 0) == 0


def test_the_same_seed_gives_the_same_run() -> None:
    workload = SimulationSettings(
        scheduler=SchedulerSettings(
            groups_per_iteration=2, tokens_per_iteration=300, tokens_per_segment=16, lookahead=1
        ),
        max_staleness=4,
        iterations=4,
        group_size=3,
        max_tokens=60,
        mean_tokens=20.0,
        lost_share=0.02,
    )
    first, second = (dataclasses.asdict(Simulation(workload).run(max_ticks=MAX_TICKS)) for _ in range(2))
    assert first == second
