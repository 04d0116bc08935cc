"""Real runs as a user makes them: `pmdflow up` in a process of its own, on a small configuration."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from pmdflow.metrics.ledger import OUTSIDE_SUM
from pmdflow.store import TrajectoryStore
from pmdflow.store.archive import parts, read_part
from tests.support.paths import ROOT

MODEL = ROOT / "configs" / "tiny-arithmetic"
DEADLINE_S = 150.0


def small_config(directory: Path, **overrides: Any) -> dict[str, Any]:
    """A run of a few iterations of the tiny model; `overrides` are dotted keys with `__` for the dot."""
    config: dict[str, Any] = {
        "run": {"name": "small", "dir": str(directory / "runs"), "iterations": 4, "seed": 1},
        "model": {"path": str(MODEL), "dtype": "float32"},
        "data": {
            "task": "reasoning_gym/chain_sum",
            "args": {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1},
            "group_size": 4,
            "max_tokens": 120,
        },
        "eval": {"prompts": 8, "every": 2},
        "reward": {"functions": [{"function": "pmdflow.reward.reasoning_gym:score"}]},
        "rollout": {"engine": "transformers", "actors": 1, "slots": 16, "flush_interval_s": 0.1},
        "scheduler": {"groups_per_iteration": 4, "tokens_per_iteration": 2000, "lookahead": 1, "max_staleness": 4},
        "learner": {
            "ranks": 1,
            "steps_per_iteration": 2,
            "lr": 1e-4,
            "tau": 1.0,
            "aggregation": "seq-mean-token-sum",
            "checkpoint_every": 2,
        },
        "dashboard": {"port": None},
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


class Up:
    """A `pmdflow up` process, with the run directory that it writes."""

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        *,
        terminal: int | None = None,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start it, after a command `prefix`; output goes to a file, or a terminal that becomes its controlling one."""
        self.run = Path(config["run"]["dir"]) / config["run"]["name"]
        self.file = directory / "small.yaml"
        self.file.write_text(yaml.safe_dump(config))
        self._start(["up", str(self.file)], directory, terminal, prefix, env or {})

    @classmethod
    def of(cls, arguments: list[str], directory: Path, *, run: Path) -> Up:
        """Another command that writes the run directory `run`."""
        command = cls.__new__(cls)
        command.run = run
        command._start(arguments, directory)
        return command

    def _start(
        self,
        arguments: list[str],
        directory: Path,
        terminal: int | None = None,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._output = directory / f"{arguments[0]}-{time.time_ns()}.log"
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "pmdflow.cli", *arguments],
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=output if terminal is None else terminal,
                stderr=subprocess.STDOUT,
                preexec_fn=None if terminal is None else lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0),
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})},
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace")

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Exit code; a run that is not over in time is killed and fails the test with its output."""
        try:
            return self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise AssertionError(f"not over after {timeout_s} s:\n{self.output}") from None

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Wait until `condition` holds while the process lives."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill_everything()
                raise AssertionError(f"{what} did not come about:\n{self.output}")
            time.sleep(0.05)

    def iterations(self) -> list[dict[str, Any]]:
        """Iteration records so far."""
        return [record for record in read_lines(self.run / "metrics.jsonl") if record["kind"] == "iteration"]

    def samples(self) -> list[dict[str, Any]]:
        """Numbers of the store, one a second while the actors are watched."""
        return [record for record in read_lines(self.run / "metrics.jsonl") if record["kind"] == "sample"]

    def reached(self, iteration: int) -> bool:
        """Whether this iteration is done."""
        return any(record["iteration"] >= iteration for record in self.iterations())

    def events(self) -> list[dict[str, Any]]:
        """Event records so far."""
        return read_lines(self.run / "events.jsonl")

    def actor(self, name: str) -> psutil.Process:
        """The Ray process of an actor class."""
        found = [process for process in self.processes() if name in " ".join(process.cmdline())]
        assert found, f"no process of {name}"
        return found[0]

    def processes(self) -> list[psutil.Process]:
        """The process and all its descendants."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill_everything(self) -> None:
        """SIGKILL for every process of the run at once."""
        processes = self.processes()
        for process in processes:
            try:
                process.send_signal(signal.SIGSTOP)
            except psutil.NoSuchProcess:
                continue
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=20)
        self.process.wait(timeout=20)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; a missing file has none."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def ledger_of(record: dict[str, float]) -> dict[str, float]:
    """The places of the ledger in an iteration record, and their sum `generated`."""
    ledger = {key.removeprefix("ledger/"): value for key, value in record.items() if key.startswith("ledger/")}
    for outside in OUTSIDE_SUM:
        ledger.pop(outside)
    return ledger


def assert_prompts_once(run: Path) -> None:
    """Every admitted cursor below the last trained one was trained in exactly one group."""
    seen: dict[str, int] = {}
    for path in parts(run):
        batch = read_part(path)
        for prompt in {(int(group), name) for group, name in zip(batch.groups, batch.prompt_ids, strict=True)}:
            seen[prompt[1]] = seen.get(prompt[1], 0) + 1
    assert seen
    assert set(seen.values()) == {1}


def assert_exact(up: Up) -> None:
    """The ledger's sums match, and every admitted prompt is either archived once or still in the store."""
    ledger = ledger_of(up.iterations()[-1])
    assert ledger.pop("generated") == sum(ledger.values())
    assert_prompts_once(up.run)
    store = TrajectoryStore(up.run / "store", groups_per_iteration=4, lookahead=1, max_staleness=None)
    untrained = [group["cursor"] for group in store.groups() if group["iteration"] is None]
    waiting = {f"chain_sum-{cursor}" for cursor in untrained if cursor is not None}  # None: of an evaluation
    cursors = store.counts().next_cursor
    evicted = sum(count for place, count in store.ledger().items() if place.startswith("evicted_"))
    store.close()
    trained = {name for path in parts(up.run) for name in read_part(path).prompt_ids}
    assert not waiting & trained
    assert evicted == 0  # the runs are unbounded in staleness
    assert waiting | trained == {f"chain_sum-{cursor}" for cursor in range(cursors)}


def pmdflow(
    *arguments: str, timeout_s: float = DEADLINE_S, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end, in this environment or another."""
    return subprocess.run(
        [sys.executable, "-m", "pmdflow.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
        env=env,
    )
