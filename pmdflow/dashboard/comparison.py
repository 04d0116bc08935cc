"""Several runs on one page: the same charts over each other, and the settings in which they differ."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmdflow.dashboard.panels import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Figure,
    iteration_axis,
    make_layout,
    make_line,
)
from pmdflow.dashboard.queries import RunView, column

CHARTS: Mapping[str, tuple[str, str, str]] = {
    "reward": ("Train reward", "reward/mean", "reward"),
    "length": ("Response length", "trajectory/length_mean", "tokens"),
    "staleness": ("Mean staleness of tokens with a gradient", "staleness/mean", "iterations"),
    "budget": ("Tokens spent by each iteration", "scheduler/tokens_spent", "tokens"),
    "busy": ("Rollout busy", "rollout/busy_share", "share of the time"),
    "time": ("Time of an iteration", "time/iteration_s", "seconds"),
}
"""Caption, key and axis of each chart over iterations, by the id of its element; held-out reward has one of its own."""
HELD_OUT = "Held-out reward"
ABSENT = "-"
"""What stands for a setting that a run does not have."""
_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)


class Comparison:
    """Run directories that may still grow, side by side.

    Example:
        comparison = Comparison([Path("runs/a"), Path("runs/b")])
        comparison.refresh()
        print(comparison.differences())
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        """Read nothing yet."""
        self.views = [RunView(run) for run in runs]
        self.lock = threading.RLock()
        """Hold it from `refresh` to the last read."""

    def refresh(self) -> list[int]:
        """Read what the files have gained and return the revision of each run."""
        return [view.refresh() for view in self.views]

    def names(self) -> list[str]:
        """A name for each run: its own, or its path where several are called the same."""
        often = Counter(view.name for view in self.views)
        return [view.name if often[view.name] == 1 else str(view.run_dir) for view in self.views]

    def facts(self) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """State of each run, and rows of (label, a value a run) about all that each has done so far."""
        tiles = [dict(view.totals()) for view in self.views]
        labels = dict.fromkeys(label for own in tiles for label in own)
        rows = [(label, [own.get(label, ABSENT) for own in tiles]) for label in labels]
        return [view.diagnosis().state for view in self.views], rows

    def differences(self) -> list[tuple[str, list[str]]]:
        """Settings that are not the same in all runs: (key, a value a run)."""
        flat = [dict(_leaves(view.config)) for view in self.views]
        keys = sorted({key for settings in flat for key in settings})
        rows = [(key, [settings.get(key, ABSENT) for settings in flat]) for key in keys]
        return [(key, values) for key, values in rows if len(set(values)) > 1]

    def figures(self) -> dict[str, Figure]:
        """Every chart, by the id of its element: a line a run, in the same colour everywhere."""
        runs = list(zip(self.names(), self.views, strict=True))
        longest = max((view.iterations() for view in self.views), key=len)
        charts = {name: _chart(runs, key, axis, longest) for name, (_, key, axis) in CHARTS.items()}
        held_out = [
            make_line(
                name, column(view.evals(), "eval/round"), column(view.evals(), "eval/reward_mean"), _colour(number)
            )
            for number, (name, view) in enumerate(runs)
        ]
        return charts | {"held-out": {"data": held_out, "layout": make_layout(iteration_axis(longest), "reward")}}


def _chart(runs: Sequence[tuple[str, RunView]], key: str, axis: str, longest: Sequence[Mapping[str, Any]]) -> Figure:
    data = []
    for number, (name, view) in enumerate(runs):
        records = view.iterations()
        data.append(make_line(name, column(records, "iteration"), column(records, key), _colour(number)))
    return {"data": data, "layout": make_layout(iteration_axis(longest), axis)}


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted key; a list is one setting."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, str(values)
