"""Charts as pure functions of records."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from pmdflow.dashboard import panels
from pmdflow.dashboard.queries import RunView
from pmdflow.metrics.spans import Wait, Work
from tests.support.fixture_run import FixtureRun, span


def test_the_timeline_has_a_lane_an_actor_and_hatched_bubbles(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path, start=1000.0)
    run.iterate(6, archive=False)
    view = RunView(run.run_dir)
    view.refresh()
    figure = panels.figures(view)["timeline"]
    lanes = figure["layout"]["yaxis"]["categoryarray"]
    assert set(lanes) == {"rollout-0", "rollout-1", "reward", "controller", "learner-0"}
    hatched = {trace["name"] for trace in figure["data"] if "pattern" in trace["marker"]}
    assert hatched == {"bubble: claim", "bubble: lease", "bubble: groups"}
    generate = next(trace for trace in figure["data"] if trace["name"] == "generate")
    assert sum(generate["x"]) == pytest.approx(2 * 6 * 4 * 0.84, abs=0.01)


def test_the_timeline_is_bounded_in_time_and_bars() -> None:
    spans = [
        {"actor": "rollout-0", "name": "generate", "start": 0.01 * i, "end": 0.01 * i + 0.009} for i in range(50_000)
    ]
    (trace,) = panels.timeline(spans, 0.0)["data"]
    assert len(trace["x"]) == 1
    assert trace["base"][0] == pytest.approx(380, abs=0.1) and trace["x"][0] == pytest.approx(120, abs=0.1)
    assert panels.timeline([], 0.0)["data"] == []


def test_long_runs_are_thinned_and_keep_their_end() -> None:
    kept = panels.thin([{"time": i} for i in range(10_000)])
    assert len(kept) <= 701 and kept[-1] == {"time": 9999}
    assert panels.thin([]) == []


def test_tokens_over_the_limit_stand_out() -> None:
    over = panels.staleness([{"iteration": 1, "staleness/tokens": {"0": 9, "5": 1}}], 4)["data"][1]
    assert over["name"] == "5 OVER THE LIMIT" and over["y"] == [10.0]


def test_exactly_the_names_that_actors_give_have_a_colour() -> None:
    assert set(panels.SPAN_COLOURS) == {*get_args(Work), *get_args(Wait)}


def test_the_colour_of_an_unknown_span_does_not_change_while_one_looks() -> None:
    def colours(*names: str) -> dict[str, str]:
        spans = [span(name, number, number + 0.5) for number, name in enumerate(names)]
        return {trace["name"]: trace["marker"]["color"] for trace in panels.timeline(spans, 0.0)["data"]}

    before = colours("generate", "prefill", "wait_weights")
    after = colours("step", "another", "generate", "prefill", "flush", "wait_weights", "wait_lease")
    assert before.items() <= after.items()
    assert len(before) == 3 and before["generate"] == panels.SPAN_COLOURS["generate"]


def test_lanes_of_many_actors_are_in_the_order_of_their_numbers() -> None:
    spans = [span("generate", 0.0, 1.0, f"rollout-{number}") for number in (10, 2, 0)]
    figure = panels.timeline([*spans, span("step", 0.0, 1.0, "learner-0")], 0.0)
    lanes = figure["layout"]["yaxis"]["categoryarray"][::-1]
    assert lanes == ["rollout-0", "rollout-2", "rollout-10", "learner-0"]
