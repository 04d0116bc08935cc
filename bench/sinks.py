"""Does a sink that is killed or stopped cost training time?

A short run on the tiny model, four ways that take turns: without a sink, with TensorBoard's, with one that is killed
(SIGKILL), and with one that is stopped (SIGSTOP) after the first iteration. Prints the seconds from the first to the
last iteration record, as a median and a range, and against the runs without a sink.

    uv run python bench/sinks.py --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
WAYS = ("no sink", "a sink", "killed", "stopped")


def settings(folder: Path, *, iterations: int, sink: bool) -> dict[str, Any]:
    return {
        "run": {"name": "run", "dir": str(folder), "iterations": iterations, "seed": 1},
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


def sink_of(up: psutil.Process) -> psutil.Process | None:
    """The sink of an `up` process; None if it has none now."""
    for child in up.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "sink" in child.cmdline():
                return child
    return None


def end(up: psutil.Process) -> None:
    """Kill what is left of a run; of one that has ended, nothing is."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (*up.children(recursive=True), up):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def train(way: str, folder: Path, *, most: int, timeout_s: float) -> float:
    """Seconds from the first to the last iteration of one run, which is given up after `timeout_s`."""
    file, log = folder / "run.yaml", folder / "log"
    file.write_text(yaml.safe_dump(settings(folder, iterations=most, sink=way != "no sink")))
    deadline = time.monotonic() + timeout_s
    with log.open("wb") as output:
        up = psutil.Popen([sys.executable, "-m", "pmdflow.cli", "up", str(file)], stdout=output, stderr=output)
    try:
        sent = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}.get(way)
        while up.poll() is None and time.monotonic() < deadline:
            if sent is not None and iterations(folder / "run") and (sink := sink_of(up)) is not None:
                sink.send_signal(sent)
                sent = None
            time.sleep(0.05)
        times = iterations(folder / "run")
        if up.poll() != 0 or len(times) != most or sent is not None:
            raise SystemExit(f"{way}: ended with {up.poll()} after {len(times)} iterations\n{log.read_text()}")
    finally:
        end(up)
    return times[-1] - times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=10, help="of each run, 3 at least")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="after which a run is given up")
    asked = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(asked.rounds):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            with tempfile.TemporaryDirectory() as folder:
                found[way].append(train(way, Path(folder), most=asked.iterations, timeout_s=asked.timeout))
                print(f"round {number + 1}, {way}: {found[way][-1]:.2f} s", flush=True)
    base = statistics.median(found["no sink"])
    for way, seconds in found.items():
        middle = statistics.median(seconds)
        print(f"{way:8} {middle:6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})  {middle / base:.3f} x")


if __name__ == "__main__":
    main()
