"""`pmdflow.up` in a script of its own, with every sink: one is killed, one is stopped, and the run does not notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pmdflow.metrics.companion import require_port
from pmdflow.store.archive import parts, read_part
from tests.support.paths import ROOT
from tests.support.runs import pmdflow, read_lines, small_config
from tests.support.sinks import READERS, environment, expected

pytestmark = pytest.mark.timeout(800)

SCRIPT = """
import json, sys
import pmdflow

run = pmdflow.up(json.loads(sys.argv[1]))
print(json.dumps({
    "iterations": [row["iteration"] for row in run.metrics()],
    "trained": len({group.id for group in run.groups() if group.iteration is not None}),
    "in the store": sum(trajectory.state != "archived" for trajectory in run.trajectories()),
    "newest": run.checkpoint().iteration,
}))
"""


def sinks_of(process: psutil.Process) -> dict[str, psutil.Process]:
    """The sink processes of a run by name."""
    found = {}
    for child in process.children():
        words = child.cmdline()
        if "sink" in words:
            found[words[-1]] = child
    return found


@pytest.mark.nightly
def test_a_run_of_a_script_goes_on_whatever_becomes_of_its_sinks(tmp_path: Path) -> None:
    port = require_port("test", "127.0.0.1", 0, hint="")
    config = small_config(tmp_path, run__iterations=5)
    config["metrics"] = {
        "sinks": ["tensorboard", {"name": "wandb", "mode": "offline"}, "trackio", {"name": "prometheus", "port": port}]
    }
    run = Path(config["run"]["dir"]) / config["run"]["name"]
    variables = environment(tmp_path) | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(config)],
        cwd=tmp_path, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            wait_until(process, lambda: len(iterations(run)) >= 1)
            sinks = sinks_of(psutil.Process(process.pid))
            assert sinks.keys() == {"tensorboard", "wandb", "trackio", "prometheus"}
            sinks["tensorboard"].send_signal(signal.SIGKILL)
            sinks["trackio"].send_signal(signal.SIGSTOP)
            wait_until(process, lambda: 'pmdflow_iteration{run="small"}' in scrape(port))
            output, errors = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()
    assert process.returncode == 0, errors
    said = json.loads(output.splitlines()[-1])
    assert said["iterations"] == [1, 2, 3, 4, 5] and said["newest"] == 5
    assert said["trained"] == sum(len(set(read_part(path).groups.tolist())) for path in parts(run))
    assert all(f"`pmdflow sink {run} {name}` sends the rest" in errors for name in ("tensorboard", "trackio"))
    for name, read in READERS.items():
        assert pmdflow("sink", str(run), name, env=variables).returncode == 0
        found, wanted = read(run, variables), expected(run)
        for key in ("reward/mean", "eval/reward_mean", "learner/grad_norm"):
            assert found[key] == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted[key]], (name, key)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def iterations(run: Path) -> list[object]:
    return [record for record in read_lines(run / "metrics.jsonl") if record["kind"] == "iteration"]


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
