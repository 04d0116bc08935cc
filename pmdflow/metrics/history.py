"""What a run directory's JSON lines say, read incrementally; the same for a live, crashed or finished run."""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_BLOCK_BYTES = 1 << 22
_MOST_SAMPLES = 4096
_MOST_EVENTS = 1000


class JsonLines:
    """A growing file of JSON lines, read by byte offset; a torn last line waits for its rest.

    Lines that are not JSON objects are skipped: telemetry of a crashed machine must not hide the rest.
    """

    def __init__(self, path: Path, *, tail_bytes: int | None = None) -> None:
        """Start at the beginning, or at most `tail_bytes` before the present end."""
        self._path = path
        self._offset = 0
        self._skip_partial = False
        size = path.stat().st_size if path.exists() else 0
        if tail_bytes is not None and size > tail_bytes:
            self._offset = size - tail_bytes
            self._skip_partial = True

    def read(self) -> list[Record]:
        """Return the whole lines that were added since the last call; a missing file is empty."""
        records: list[Record] = []
        try:
            file = open(self._path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return records
        with file:
            file.seek(self._offset)
            rest = b""
            while block := file.read(_BLOCK_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                self._offset += sum(len(line) + 1 for line in lines)
                if self._skip_partial and lines:
                    lines = lines[1:]
                    self._skip_partial = False
                records.extend(record for record in map(_parse, lines) if record is not None)
        return records


class History:
    """The surviving history of one run: what a resume has superseded is left out.

    Iterations count up in a surviving history, so a record of iteration i supersedes every earlier record of
    iteration i and above, and evaluations of theirs but those of weights as new as its own: such a round may be over
    before its iteration is recorded.
    """

    def __init__(self, run_dir: Path, *, max_spans: int | None = None) -> None:
        """Read nothing yet; `max_spans` keeps only the newest spans (None: all)."""
        self.iterations: dict[int, Record] = {}
        self.evals: dict[int, Record] = {}
        """Rounds on the held-out prompts of `data`, by iteration."""
        self.eval_sets: dict[str, dict[int, Record]] = defaultdict(dict)
        """Those on each of `eval.sets`."""
        self.samples: list[Record] = []
        """Evenly thinned beyond some thousands."""
        self.events: deque[Record] = deque(maxlen=_MOST_EVENTS)
        self.spans: deque[Record] = deque(maxlen=max_spans)
        self.last_time: float | None = None
        """Time of the newest metric, unix seconds."""
        self.first_time: float | None = None
        self._metrics = JsonLines(run_dir / "metrics.jsonl")
        self._events = JsonLines(run_dir / "events.jsonl")
        tail = None if max_spans is None else max_spans * 400  # a span line is about 150 to 300 bytes
        self._spans = JsonLines(run_dir / "spans.jsonl", tail_bytes=tail)

    def update(self) -> bool:
        """Read what was added since the last call; True if anything was."""
        metrics, spans, events = self._metrics.read(), self._spans.read(), self._events.read()
        for record in metrics:
            self._add_metric(record)
        self.spans.extend(span for span in spans if {"actor", "name", "start", "end"} <= span.keys())
        self.events.extend(events)
        for event in events:
            self._see_time(event, newest=False)
        return bool(metrics or spans or events)

    def _add_metric(self, record: Record) -> None:
        self._see_time(record, newest=True)
        match record.get("kind"):
            case "iteration" if isinstance(record.get("iteration"), int):
                number = record["iteration"]
                for later in [i for i in self.iterations if i >= number]:
                    del self.iterations[later]
                    for evals in (self.evals, *self.eval_sets.values()):
                        if _evaluated(evals.get(later, {})) < record.get("version", math.inf):
                            evals.pop(later, None)
                self.iterations[number] = record
            case "eval" if isinstance(record.get("eval/round"), int):
                evals = self.evals if "eval/set" not in record else self.eval_sets[record["eval/set"]]
                evals[record["eval/round"]] = record
            case "sample":
                self.samples.append(record)
                if len(self.samples) >= 2 * _MOST_SAMPLES:
                    self.samples = self.samples[::2]

    def _see_time(self, record: Record, *, newest: bool) -> None:
        time = record.get("time")
        if not isinstance(time, int | float):
            return
        self.first_time = time if self.first_time is None else min(time, self.first_time)
        if newest:
            self.last_time = time if self.last_time is None else max(time, self.last_time)


def _evaluated(record: Record) -> float:
    """The policy version of a round; they count up whatever is undone."""
    name = f"{record['eval/set']}/" if "eval/set" in record else ""
    return float(record.get(f"eval/{name}version", -math.inf))


def iterations(run_dir: Path) -> dict[int, Record]:
    """The iteration records of a run's surviving history, by iteration."""
    history = History(run_dir, max_spans=0)
    history.update()
    return history.iterations


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
