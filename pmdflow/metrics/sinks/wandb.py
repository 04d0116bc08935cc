"""Weights & Biases, online or in a local log that `wandb sync` uploads."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import wandb

from pmdflow import durable
from pmdflow.config.recorded import recorded_settings
from pmdflow.config.sinks import SinkConfig
from pmdflow.errors import PmdflowError
from pmdflow.metrics.sinks.rows import Row

READ_TIMEOUT_S = 300.0
"""`wandb leet inspect` has read a local log within this time."""


class WandbSink:
    """One W&B run for the run directory's life: its id, and what it surely holds, are in `RUN/sinks/wandb.json`.

    W&B's step is the number of the row; iterations are the charts' x-axis. At a start the server, or offline the local
    log, says which rows it has.

    Example:
        >>> sink = WandbSink(Path("runs/quickstart"), SinkConfig(name="wandb", mode="offline"))      # doctest: +SKIP
    """

    def __init__(self, run: Path, config: SinkConfig) -> None:
        """Begin or resume the W&B run.

        Raises:
            PmdflowError: no account, or no answer.
        """
        self._folder = run / "sinks"
        self._folder.mkdir(exist_ok=True)
        self._note = self._folder / "wandb.json"
        self._id, self._rows = uuid.uuid4().hex[:12], 0
        if self._note.is_file():
            note = json.loads(self._note.read_text())
            self._id, self._rows = str(note["id"]), int(note["rows"])
        self._remember()
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                id=self._id,
                name=run.absolute().name,
                resume="allow",
                dir=str(self._folder),
                config=recorded_settings(run),
                settings=wandb.Settings(console="off", x_transaction_log_flush_interval=1.0),
            )
        except wandb.Error as error:
            raise PmdflowError(f"wandb: {error}", hint="run `wandb login`, or set `mode: offline`") from error
        self._rows = max(self._rows, self._logged() if self._run.offline else self._run.step)
        self._run.define_metric("*", step_metric="iteration")
        self._run.define_metric("eval/*", step_metric="eval/round")

    def send(self, row: Row) -> None:
        """Log a row that W&B does not have; samples are left out, their numbers are in the iterations."""
        if row.kind != "sample" and row.number >= self._rows:
            self._run.log({**row.values, "_timestamp": row.time}, step=row.number, commit=True)
            self._rows = row.number + 1

    def close(self) -> None:
        """Wait until W&B has everything."""
        self._run.finish()
        self._remember()

    def _remember(self) -> None:
        durable.write(self._note, json.dumps({"id": self._id, "rows": self._rows}) + "\n")

    def _logged(self) -> int:
        """Rows in the local logs of earlier processes, which a kill may have ended; the last of them too."""
        numbers = [-1]
        for log in self._folder.glob(f"wandb/*-{self._id}/run-{self._id}.wandb"):
            if log.parent == Path(self._run.dir).parent:
                continue
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
            lines = subprocess.run(command, capture_output=True, text=True, timeout=READ_TIMEOUT_S, check=True).stdout
            records: list[dict[str, Any]] = [json.loads(line) for line in lines.splitlines()]
            numbers += [int(found["history"]["step"]["num"]) for found in records if found["type"] == "history"]
        return max(numbers) + 1
