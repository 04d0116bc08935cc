"""Does a sink that is killed or stopped cost training time?

A short run on the tiny model, four ways that take turns: without a sink, with TensorBoard's, with one that is killed
(SIGKILL), and with one that is stopped (SIGSTOP) after the first iteration. Prints the seconds from the first to the
last iteration record, as a median and a range, and against the runs without a sink.

    uv run python bench/sinks.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
WAYS = ("no sink", "a sink", "killed", "stopped")
ITERATIONS = 10
TIMEOUT_S = 600.0


def settings(folder: Path, *, sink: bool) -> dict[str, Any]:
    return {
        "run": {"name": "run", "dir": str(folder), "iterations": ITERATIONS, "seed": 1},
        "model": {"path": str(ROOT / "configs" / "tiny-arithmetic")},
        "data": {
            "task": "reasoning_gym/chain_sum",
            "args": {"min_terms": 3, "max_terms": 6, "min_digits": 1, "max_digits": 1},
            "max_tokens": 128,
        },
        "eval": {"prompts": 0},
        "reward": {"functions": [{"function": "pmdflow.reward.reasoning_gym:score"}]},
        "scheduler": {"groups_per_iteration": 8, "tokens_per_iteration": 4096},
        "dashboard": {"port": None},
        "metrics": {"sinks": ["tensorboard"] if sink else []},
    }


def iterations(run: Path) -> list[float]:
    """When each iteration was recorded."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record["time"] for record in map(json.loads, lines) if record["kind"] == "iteration"]


def sink_of(up: int) -> psutil.Process:
    """The sink of an `up` process."""
    children = psutil.Process(up).children(recursive=True)
    return next(child for child in children if "sink" in child.cmdline())


def train(way: str, folder: Path) -> float:
    """Seconds from the first to the last iteration of one run."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings(folder, sink=way != "no sink")))
    command = [sys.executable, "-m", "pmdflow.cli", "up", str(file)]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as up:
        deadline = time.monotonic() + TIMEOUT_S
        while not iterations(folder / "run"):
            if up.poll() is not None or time.monotonic() > deadline:
                up.kill()
                raise SystemExit((folder / "log").read_text())
            time.sleep(0.02)
        sent = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}.get(way)
        if sent is not None:
            sink_of(up.pid).send_signal(sent)
        if up.wait(TIMEOUT_S):
            raise SystemExit((folder / "log").read_text())
    times = iterations(folder / "run")
    assert len(times) == ITERATIONS
    return times[-1] - times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            with tempfile.TemporaryDirectory() as folder:
                found[way].append(train(way, Path(folder)))
                print(f"round {number + 1}, {way}: {found[way][-1]:.2f} s", flush=True)
    base = statistics.median(found["no sink"])
    for way, seconds in found.items():
        middle = statistics.median(seconds)
        print(f"{way:8} {middle:6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})  {middle / base:.3f} x")


if __name__ == "__main__":
    main()
