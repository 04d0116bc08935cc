"""The run in the terminal: one live block where it can be drawn, a fixed-column line an iteration elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pmdflow.config.schema import Config
from pmdflow.metrics.lasting import lasting
from pmdflow.metrics.signal import RECENT, no_signal
from pmdflow.metrics.text import number, percent

_REFRESH_PER_S = 4.0
_COLUMNS = (
    ("iteration", 11), ("reward", 8), ("held-out", 9), ("length", 8), ("staleness", 10),
    ("tokens/s", 9), ("busy", 7), ("wait", 7), ("seconds", 8),
)  # fmt: skip


class LiveView:
    """Shows iteration, budget, groups, staleness, rate, reward and bubbles of a running run on stderr.

    Example:
        with LiveView(config=config, dashboard_url=None) as view:
            view.iteration({"iteration": 1, "reward/mean": 0.4})
    """

    def __init__(self, *, config: Config, dashboard_url: str | None, console: Console | None = None) -> None:
        """Show nothing before the context is entered.

        Args:
            config: The run's configuration, for the number of iterations and the staleness limit.
            dashboard_url: Shown above the rest.
            console: Where to; stderr by default.
        """
        self._iterations = config.run.iterations
        limit = config.scheduler.max_staleness
        self._limit = "none" if limit is None else str(limit)
        self._title = f"{config.run.name}  dashboard: {dashboard_url}" if dashboard_url else config.run.name
        self._console = console or Console(file=lasting(sys.stderr))
        self._is_block = self._console.is_terminal and not self._console.is_dumb_terminal
        self._sample: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._event = ""
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT)
        self._warning: str | None = None
        self._header_due = True
        self._live = Live(console=self._console, refresh_per_second=_REFRESH_PER_S, get_renderable=self._render)

    def __enter__(self) -> Self:
        if self._is_block:
            self._live.start()
        else:
            self._print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, sample: Mapping[str, Any]) -> None:
        """Take a `sample` record; a terminal shows it at the next refresh."""
        self._sample.update(sample)

    def iteration(self, values: Mapping[str, Any]) -> None:
        """Take an `iteration` record; without a terminal it is a line."""
        self._last.update(values)
        self._recent.append(values)
        warned, self._warning = self._warning, None
        if len(self._recent) == RECENT:
            self._warning = no_signal(list(self._recent))
        if not self._is_block:
            if self._header_due:
                self._print("".join(f"{name:>{width}}" for name, width in _COLUMNS))
                self._header_due = False
            cells = zip(self._cells(), _COLUMNS, strict=True)
            self._print("".join(f"{cell:>{width}}" for cell, (_, width) in cells))
            if self._warning and not warned:
                self._print(self._warning)

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """Take an `eval` record; it is in the next line."""
        if "eval/set" not in values:
            self._last["eval/reward_mean"] = values.get("eval/reward_mean")

    def event(self, kind: str, message: str) -> None:
        """Take an event; the block shows the newest, without a terminal each is a line."""
        self._event = f"{kind}: {message}"
        if not self._is_block:
            self._print(self._event)

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _cells(self) -> list[str]:
        last = self._last
        return [
            f"{last.get('iteration', 0)}/{self._iterations}",
            number(last.get("reward/mean"), 3),
            number(last.get("eval/reward_mean"), 3),
            number(last.get("trajectory/length_mean"), 1),
            f"{number(last.get('staleness/mean'), 1)}/{self._limit}",
            number(last.get("rollout/tokens_per_s"), 0),
            percent(last.get("rollout/busy_share")),
            percent(_wait_share(last)),
            number(last.get("time/iteration_s"), 1),
        ]

    def _render(self) -> RenderableType:
        sample, last = self._sample, self._last
        done = int(last.get("iteration") or 0)
        spent, budget = int(sample.get("scheduler/tokens_spent") or 0), int(sample.get("scheduler/tokens_budget") or 0)
        flying = sum(int(sample.get(f"store/trajectories_{kind}") or 0) for kind in ("leased", "idle"))
        bars = Table.grid(padding=(0, 1))
        bars.add_row("iteration", _bar(done, self._iterations), f"{done}/{self._iterations}")
        bars.add_row("budget", _bar(spent, budget), f"{spent:,}/{budget:,} tokens")
        rate = sample.get("rollout/tokens_per_s") or last.get("rollout/tokens_per_s")
        facts = Table.grid(padding=(0, 3))
        facts.add_row(
            f"version {number(sample.get('scheduler/version'), 0)}",
            f"groups ready {number(sample.get('store/groups_ready'), 0)}",
            f"trajectories in flight {flying}",
            f"tokens/s {number(rate, 0)}",
        )
        facts.add_row(
            f"reward {number(last.get('reward/mean'), 3)} (held-out {number(last.get('eval/reward_mean'), 3)})",
            f"length {number(last.get('trajectory/length_mean'), 1)}",
            f"staleness {number(last.get('staleness/mean'), 1)}, limit {self._limit}",
            f"rollout busy {percent(last.get('rollout/busy_share'))}, learner waits {percent(_wait_share(last))}",
        )
        title = Text(self._title, style="bold", no_wrap=True, overflow="ellipsis")
        warning = [Text(self._warning, style="bold")] if self._warning else []
        return Group(title, bars, facts, *warning, Text(self._event, style="dim", no_wrap=True, overflow="ellipsis"))


def _bar(part: int, whole: int) -> ProgressBar:
    return ProgressBar(total=max(whole, 1), completed=min(part, whole), width=30)


def _wait_share(values: Mapping[str, Any]) -> float | None:
    """Share of the iteration that the learner waited for its claim."""
    waited, whole = values.get("time/claim_wait_s"), values.get("time/iteration_s")
    return waited / whole if waited is not None and whole else None
