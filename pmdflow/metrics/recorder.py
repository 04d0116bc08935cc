"""The one writer of a run directory's `metrics.jsonl`, `spans.jsonl` and `events.jsonl`."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from pmdflow.errors import PmdflowError

MetricKind = Literal["iteration", "sample", "eval"]

_BLOCK_BYTES = 1 << 16


class Recorder:
    """Appends metrics, spans and events to a run directory, a line each, visible to readers at once.

    Example:
        >>> import tempfile
        >>> with Recorder(tempfile.mkdtemp()) as recorder:
        ...     recorder.metric("eval", {"eval/round": 0, "eval/reward_mean": 0.4})
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        """Open the files of `run_dir`; a torn last line of an earlier process is cut off.

        Raises:
            PmdflowError: a file cannot be opened.
        """
        directory = Path(run_dir)
        self._clock = clock
        self._metrics = _LineFile(directory / "metrics.jsonl")
        self._spans = _LineFile(directory / "spans.jsonl")
        self._events = _LineFile(directory / "events.jsonl")

    def metric(self, kind: MetricKind, values: Mapping[str, Any]) -> None:
        """Append one record; keys are `component/name_unit`, non-finite numbers become null.

        Raises:
            PmdflowError: the line could not be written; names the file and the remedy.
        """
        self._metrics.append([{"time": self._clock(), "kind": kind, **values}])

    def spans(self, spans: Iterable[Mapping[str, Any]]) -> None:
        """Append drained spans (see `SpanBuffer.drain`).

        Raises:
            PmdflowError: as in `metric`.
        """
        self._spans.append(spans)

    def event(self, kind: str, message: str, **attrs: Any) -> None:
        """Append something that happened once, such as `start`, `actor_died` or `finish`.

        Raises:
            PmdflowError: as in `metric`.
        """
        self._events.append([{"time": self._clock(), "kind": kind, "message": message, **attrs}])

    def close(self) -> None:
        """Close the files. Safe to repeat."""
        for file in (self._metrics, self._spans, self._events):
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LineFile:
    """An append-only file of JSON lines that never keeps half a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            self._cut_torn_line()
        except OSError as error:
            raise _write_error(path, error) from error

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        lines = b"".join(json.dumps(_plain(record), allow_nan=False).encode() + b"\n" for record in records)
        with self._lock:
            size = os.fstat(self._file.fileno()).st_size
            rest = memoryview(lines)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                if len(rest) < len(lines):
                    self._file.truncate(size)  # invariant: the file holds whole lines only
                raise _write_error(self._path, error) from error

    def close(self) -> None:
        self._file.close()

    def _cut_torn_line(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        start = end
        while start > 0:
            stop, start = start, max(0, start - _BLOCK_BYTES)
            block = os.pread(self._file.fileno(), stop - start, start)
            newline = block.rfind(b"\n")
            if newline >= 0:
                start += newline + 1
                break
        if start < end:
            self._file.truncate(start)


def _plain(value: Any) -> Any:
    """`value` as JSON types: NumPy converted, non-finite numbers None, keys strings."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def _write_error(path: Path, error: OSError) -> PmdflowError:
    return PmdflowError(
        f"cannot write {path}: {error.strerror}",
        hint="make the run directory writable with free space on its disk, then start the same `pmdflow up` again: "
        "it resumes",
    )
