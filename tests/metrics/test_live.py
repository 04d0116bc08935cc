"""The run in the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from pmdflow.config.schema import Config
from pmdflow.metrics.live import LiveView


def view_of(*, terminal: bool) -> tuple[LiveView, io.StringIO]:
    out = io.StringIO()
    raw = {
        "run": {"name": "demo", "iterations": 60}, "model": {"path": "m"}, "data": {"task": "t.jsonl", "max_tokens": 9},
        "reward": {"functions": [{"function": "a:b"}]},
        "scheduler": {"groups_per_iteration": 4, "tokens_per_iteration": 8192},
    }  # fmt: skip
    console = Console(file=out, force_terminal=terminal, width=120)
    config = Config.model_validate(raw)
    return LiveView(config=config, dashboard_url="http://127.0.0.1:1", console=console), out


def test_without_a_terminal_every_iteration_is_a_line_of_fixed_columns() -> None:
    view, out = view_of(terminal=False)
    with view:
        view.update({"scheduler/tokens_spent": 5})
        view.evaluation({"eval/reward_mean": 0.4})
        for number in (9, 10):
            view.iteration({"iteration": number, "reward/mean": 0.5, "time/iteration_s": 4.0, "time/claim_wait_s": 1.0})
        view.event("checkpoint", "iteration 10")
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "demo  dashboard: http://127.0.0.1:1"
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[3].split()[:3] == ["10/60", "0.500", "0.400"] and "25%" in lines[3]
    assert lines[4] == "checkpoint: iteration 10"


def test_a_terminal_shows_budget_groups_and_bubbles() -> None:
    view, out = view_of(terminal=True)
    with view:
        view.update({"scheduler/tokens_spent": 4096, "scheduler/tokens_budget": 8192, "store/groups_ready": 3})
        view.iteration({"iteration": 12, "reward/mean": 0.5, "rollout/busy_share": 0.93})
        view.event("actor_died", "rollout-0 [red] was killed")
    text = out.getvalue()
    for expected in (
        "http://127.0.0.1:1",
        "12/60",
        "4,096/8,192 tokens",
        "groups ready 3",
        "93%",
        "rollout-0 [red] was killed",
    ):
        assert expected in text
