"""The summary of a run, from its files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pmdflow.config.schema import Config
from pmdflow.dashboard.queries import RunView
from pmdflow.metrics.ledger import ledger_gap
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.summary import render_summary
from tests.support.fixture_run import MAX_STALENESS, FixtureRun
from tests.support.runs import small_config

NOTHING_RIGHT = {"reward/mean": 0.0, "reward/std": 0.0, "trajectory/length_share": 0.9}


def test_the_summary_states_learning_ledger_staleness_and_time(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    run.iterate(10, archive=False)
    text = render_summary(tmp_path)
    assert "held-out reward   0.400 (v0) -> 0.757 (v10), 128 prompts" in text
    assert "(iteration 1 -> 10)" in text and "10 in 40 s" in text
    assert "sums match" in text
    assert f"(limit: {MAX_STALENESS})" in text and " 0 tokens over the limit" in text
    assert "rollout busy after start-up            93.9%" in text
    assert "wait_claim 39.4%" in text and "wait_lease" in text
    assert "generation during learner steps        100.0% of step time" in text


def test_the_summary_counts_what_is_wrong(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    run.iterate(1, archive=False)
    run.recorder.metric(
        "iteration", {"iteration": 2, "staleness/tokens": {"0": 5, "9": 3}, "ledger/generated": 10, "ledger/trained": 7}
    )
    text = render_summary(tmp_path)
    assert "3 tokens over the limit" in text
    assert "SUM DIFFERS by 3" in text
    assert ledger_gap({"generated": 10, "trained": 10, "prompt": 4}) == 0


def test_lengths_by_step_are_those_of_the_present_number_of_steps(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    for number in range(1, 11):
        by_step = [10.0, 20.0] if number < 6 else [30.0, 40.0, None]
        values = {"trajectory/length_mean": float(number % 3), "trajectory/length_by_step": by_step}
        run.recorder.metric("iteration", {"iteration": number, **values})
    text = render_summary(tmp_path)
    assert "mean by optimizer step 30.0 / 40.0 / -" in text


def test_delays_are_shown_by_length(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    for number in (1, 2):
        values = {"trajectory/delay_by_decile": [float(number), None, 4.0], "trajectory/bypasses_max": 5 * number}
        run.recorder.metric("iteration", {"iteration": number, **values})
    text = render_summary(tmp_path)
    assert "delay             1.5 - 4.0 iterations from admission to claim" in text
    assert "at most 10 younger groups" in text


def test_a_run_without_an_iteration_has_a_summary(tmp_path: Path) -> None:
    assert "no iteration was finished" in render_summary(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (NOTHING_RIGHT, "every reward of the last 3 iterations is 0.000; likely causes: the reward function finds no"),
        (NOTHING_RIGHT, "90% of the answers are cut at data.max_tokens"),
        ({"reward/mean": 1.0, "reward/std": 0.0}, "is 1.000; likely causes: the task is solved"),
        ({"reward/mean": 0.5, "reward/std": 0.5, "reward/signal_share": 0.0}, "a low rollout.temperature"),
        ({"reward/mean": 0.5, "reward/std": 0.5, "learner/filter_share": 1.0}, "leave out every group of the last 3"),
    ],
)  # fmt: skip
def test_rewards_that_teach_nothing_are_said_with_likely_causes(
    tmp_path: Path, values: dict[str, float], words: str
) -> None:
    run = FixtureRun(tmp_path)
    for number in range(1, 5):
        run.recorder.metric("iteration", {"iteration": number, "reward/signal_share": 0.5, **values})
    assert words in render_summary(tmp_path)
    view = RunView(tmp_path, clock=lambda: run.now)
    view.refresh()
    assert words in str(view.diagnosis().warning)
    with LiveView(
        config=Config.model_validate(small_config(tmp_path)),
        dashboard_url=None,
        console=(console := Console(file=io.StringIO(), width=500)),
    ) as live:
        for _ in range(4):
            live.iteration(values)
    assert console.file.getvalue().count(words) == 1
    run.recorder.metric(
        "iteration", {"iteration": 5, "reward/mean": 0.25, "reward/std": 0.4, "reward/signal_share": 0.5}
    )
    view.refresh()
    assert "NO SIGNAL" not in render_summary(tmp_path) and view.diagnosis().warning is None
