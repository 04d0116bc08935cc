"""Trackio's local database."""

from __future__ import annotations

import json
from pathlib import Path

import trackio
from trackio.sqlite_storage import SQLiteStorage

from pmdflow import durable
from pmdflow.config.recorded import recorded_settings
from pmdflow.config.sinks import SinkConfig
from pmdflow.metrics.sinks.rows import Row


class TrackioSink:
    """One trackio run for the run directory's life; its name is in `RUN/sinks/trackio.json`. Steps are iterations.

    Example:
        >>> sink = TrackioSink(Path("runs/quickstart"), SinkConfig(name="trackio"))      # doctest: +SKIP
    """

    def __init__(self, run: Path, config: SinkConfig) -> None:
        """Begin or resume the trackio run; a name that another run of the project has gets a number."""
        note = run / "sinks" / "trackio.json"
        if not note.is_file():
            note.parent.mkdir(exist_ok=True)
            durable.write(note, json.dumps({"name": _free_name(config.project, run.absolute().name)}) + "\n")
        name = str(json.loads(note.read_text())["name"])
        self._run = trackio.init(
            project=config.project,
            name=name,
            resume="allow",
            config=recorded_settings(run),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._rows = SQLiteStorage.get_log_count(config.project, name, run_id=self._run.id)

    def send(self, row: Row) -> None:
        """Log a row that the database does not have; samples are left out, their numbers are in the iterations."""
        if row.kind != "sample" and row.number >= self._rows:
            self._run.log(dict(row.values), step=row.step)
            self._rows = row.number + 1

    def close(self) -> None:
        """Wait until the database has everything."""
        self._run.finish()


def _free_name(project: str, name: str) -> str:
    taken = set(SQLiteStorage.get_runs(project)) if SQLiteStorage.get_project_db_path(project).exists() else set()
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(free for free in names if free not in taken)
