"""What a run has recorded, as a growing sequence of rows of numbers that sinks send on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmdflow.metrics.history import JsonLines, Record

RowKind = Literal["iteration", "eval", "sample"]

_STEPS = {"iteration": "iteration", "eval": "eval/round"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The numbers of one record of `metrics.jsonl`, by the keys of METRICS.md, and how many events came before it."""

    kind: RowKind
    number: int
    """Iterations and evaluations recorded before it, the superseded ones too: it never changes, whenever one looks."""
    step: int
    """The iteration, or the one after which the evaluation began; of a sample the last iteration."""
    time: float
    """Unix seconds."""
    values: dict[str, float]


class Rows:
    """Reads the rows of a run directory as they come.

    Example:
        >>> rows = Rows(Path("runs/quickstart"))                      # doctest: +SKIP
        >>> [row.values["reward/mean"] for row in rows.read() if row.kind == "iteration"]      # doctest: +SKIP
    """

    def __init__(self, run: Path) -> None:
        """Begin at the run's beginning."""
        self._metrics = JsonLines(run / "metrics.jsonl")
        self._events = JsonLines(run / "events.jsonl")
        self._waiting: deque[Record] = deque()
        self._happened: Counter[str] = Counter()
        self._number = 0
        self._iteration = 0

    def read(self) -> Iterator[Row]:
        """The rows that were added since the last call."""
        records = self._metrics.read()
        self._waiting.extend(self._events.read())  # after the records: what came before them is there
        for record in records:
            row = self._row(record)
            if row is not None:
                yield row

    def _row(self, record: Record) -> Row | None:
        kind, time = record.get("kind"), record.get("time")
        step = record.get(_STEPS.get(str(kind), ""), self._iteration)
        if (
            kind not in ("iteration", "eval", "sample")
            or not isinstance(time, int | float)
            or not isinstance(step, int)
        ):
            return None
        while self._waiting and self._waiting[0].get("time", 0.0) <= time:
            self._happened[f"event/{self._waiting.popleft().get('kind')}"] += 1
        numbers = {
            key: float(value) for key, value in record.items() if isinstance(value, int | float) and key != "time"
        }
        row = Row(kind=kind, number=self._number, step=step, time=time, values=numbers | dict(self._happened))
        self._number += kind != "sample"
        if kind == "iteration":
            self._iteration = step
        return row
