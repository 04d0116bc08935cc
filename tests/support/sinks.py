"""What sinks have received, read back by the own reader of each, and what they should have."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pmdflow.config.schema import Config
from tests.support.fixture_run import FixtureRun
from tests.support.paths import ROOT
from tests.support.runs import read_lines, small_config

Curves = dict[str, list[tuple[int, float]]]
"""Steps and values by key."""
KEYS = ("reward/mean", "learner/grad_norm", "ledger/generated", "eval/reward_mean", "event/start", "event/checkpoint")


class SinkRun(FixtureRun):
    """A run directory that grows without a run, with a whole configuration."""

    def __init__(self, directory: Path, *sinks: Any) -> None:
        """`sinks` are those of the configuration; what they keep elsewhere is kept below `directory`."""
        settings = small_config(directory, run__name="sums")
        settings["metrics"] = {"sinks": list(sinks)}
        config = Config.model_validate(settings)
        super().__init__(Path(config.run.dir) / config.run.name)
        (self.run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.environment = environment(directory)

    @contextmanager
    def live(self) -> Iterator[None]:
        """As if an `up` held the directory."""
        with open(self.run_dir / "run.lock", "w", encoding="utf-8") as lock:
            lock.write(str(os.getpid()))
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def sink(self, name: str) -> subprocess.Popen[str]:
        """Begin `pmdflow sink`."""
        return subprocess.Popen(
            [sys.executable, "-m", "pmdflow.cli", "sink", str(self.run_dir), name],
            env=self.environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip


def environment(directory: Path) -> dict[str, str]:
    """Variables of a process whose sinks write below `directory` and ask no network."""
    return os.environ | {"TRACKIO_DIR": str(directory / "trackio"), "WANDB_DIR": str(directory), "WANDB_SILENT": "true"}


def expected(run: Path) -> Curves:
    """What `metrics.jsonl` says; events are counted up to each record."""
    events = read_lines(run / "events.jsonl")
    curves: Curves = {key: [] for key in KEYS}
    for record in read_lines(run / "metrics.jsonl"):
        if record["kind"] == "sample":
            continue
        step = record["iteration"] if record["kind"] == "iteration" else record["eval/round"]
        happened = Counter(f"event/{event['kind']}" for event in events if event["time"] <= record["time"])
        for key, curve in curves.items():
            value = (record | happened).get(key)
            if value is not None:
                curve.append((step, float(value)))
    return curves


def tensorboard_curves(run: Path, _environment: dict[str, str]) -> Curves:
    """Through TensorBoard's event accumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run / "sinks" / "tensorboard"
    if not folder.is_dir():
        return {}
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {key: [(event.step, event.value) for event in accumulator.Scalars(key)] for key in KEYS if key in tags}


def wandb_curves(run: Path, environment: dict[str, str]) -> Curves:
    """Through `wandb leet inspect`, over all logs of the run; the curves' x-axes are those that were defined."""
    rows: list[dict[str, Any]] = []
    logs = sorted((run / "sinks" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({log.name for log in logs}) <= 1, "one run"
    for log in logs:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        rows += [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["_step"] for row in rows] == list(range(len(rows))), "each row once, in order"
    return _curves([(row.get("eval/round", row.get("iteration")), row) for row in rows])


def trackio_curves(run: Path, environment: dict[str, str]) -> Curves:
    """Through trackio's own storage, in a process that has its directory."""
    code = (
        "import json, sys, trackio; from trackio.sqlite_storage import SQLiteStorage\n"
        "assert [run.name for run in trackio.Api().runs('pmdflow')] == [sys.argv[1]]\n"
        "print(json.dumps(SQLiteStorage.get_logs('pmdflow', sys.argv[1], max_points=None)))"
    )
    command = [sys.executable, "-c", code, run.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return _curves([(row["step"], row) for row in json.loads(done.stdout.splitlines()[-1])])


def _curves(rows: list[tuple[int, dict[str, float]]]) -> Curves:
    return {key: [(step, row[key]) for step, row in rows if key in row] for key in KEYS}


READERS: dict[str, Callable[[Path, dict[str, str]], Curves]] = {
    "tensorboard": tensorboard_curves,
    "wandb": wandb_curves,
    "trackio": trackio_curves,
}
