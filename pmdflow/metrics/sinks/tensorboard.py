"""TensorBoard event files in the run directory."""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from pmdflow.metrics.sinks.rows import Row


class TensorboardSink:
    """Writes the whole history anew at each start, into a file that takes the place of those before it.

    Steps are iterations. Where a resume goes back, TensorBoard is told to forget the steps that are made again.

    Example:
        >>> sink = TensorboardSink(Path("runs/quickstart"))       # doctest: +SKIP
        >>> sink.send(row)                                        # doctest: +SKIP
        >>> sink.close()                                          # doctest: +SKIP
    """

    def __init__(self, run: Path) -> None:
        """Begin a file in `RUN/sinks/tensorboard`."""
        self._folder = run / "sinks" / "tensorboard"
        self._folder.mkdir(parents=True, exist_ok=True)
        before = list(self._folder.iterdir())
        self._iteration = -1
        self._begin(0)
        for path in before:
            path.unlink()

    def send(self, row: Row) -> None:
        """Write a row's numbers; samples are left out, their numbers are in the iterations."""
        if row.kind == "sample":
            return
        if row.kind == "iteration":
            if row.step <= self._iteration:
                self._writer.close()
                self._begin(row.step)
            self._iteration = row.step
        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.values.items()]
        self._writer.add_event(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _begin(self, step: int) -> None:
        """A file whose first event makes readers drop what earlier files say of `step` and later ones."""
        self._writer = EventFileWriter(str(self._folder))
        self._writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()
