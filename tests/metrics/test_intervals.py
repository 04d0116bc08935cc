"""Arithmetic on spans against plain sets of seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.metrics.intervals import (
    UNRECORDED,
    busy_share,
    covered_s,
    longest_wait,
    overlap_s,
    overlap_share,
    seconds_by_name,
    union,
)
from tests.support.fixture_run import span

pairs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda p: (min(p), max(p))), max_size=12)


@given(pairs, pairs)
def test_interval_arithmetic_agrees_with_cells(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    cells = [{c for low, high in side for c in range(low, high)} for side in (first, second)]
    assert covered_s(union(first)) == len(cells[0])
    assert overlap_s(union(first), union(second)) == len(cells[0] & cells[1])


@given(pairs, pairs)
def test_each_second_of_an_actor_has_one_name(work: list[tuple[int, int]], waits: list[tuple[int, int]]) -> None:
    spans = [span("generate", *pair) for pair in work] + [span("wait_lease", *pair) for pair in waits]
    seconds = seconds_by_name(spans, 10, 40)
    assert sum(seconds.values()) == pytest.approx(30)
    covered = {c for low, high in work for c in range(low, high)} & set(range(10, 40))
    assert seconds.get("generate", 0) == pytest.approx(len(covered))
    assert busy_share(spans, "rollout", 10, 40) == (pytest.approx(len(covered) / 30) if spans else None)


def test_nested_spans_belong_to_the_inner_one() -> None:
    spans = [span("outer", 0, 10), span("inner", 2, 4), span("wait_grant", 9, 12)]
    assert seconds_by_name(spans, 0, 15) == {"outer": 8, "inner": 2, "wait_grant": 2, UNRECORDED: 3}


def test_busy_share_averages_the_actors_of_a_prefix() -> None:
    spans = [span("generate", 0, 10), span("generate", 0, 5, "rollout-1"), span("wait_lease", 5, 10, "rollout-1")]
    assert busy_share(spans, "rollout", 0, 10) == 0.75
    assert busy_share(spans, "learner", 0, 10) is None


def test_overlap_is_step_time_with_generation() -> None:
    spans = [span("step", 0, 4, "learner-0"), span("step", 6, 10, "learner-0"), span("generate", 2, 8)]
    assert overlap_share(spans) == 0.5
    assert overlap_share(spans[2:]) is None


def test_the_longest_wait_is_counted_inside_the_window() -> None:
    spans = [
        span("wait_lease", 0, 9),
        span("wait_grant", 8, 13),
        span("generate", 0, 20),
        span("wait_claim", 0, 20, "learner-0"),
    ]
    assert longest_wait(spans, "rollout", 0, 20) == "wait_lease"
    assert longest_wait(spans, "rollout", 8, 20) == "wait_grant"
    assert longest_wait(spans, "reward", 0, 20) is None
