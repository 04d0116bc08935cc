"""The examples for SLURM and Kubernetes: the shell part is run with stand-ins for the cluster's programs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import CONFIGS

SLURM = CONFIGS / "deploy" / "slurm.sh"
NODES = ("n1", "n2", "n3")
SRUN = """#!/usr/bin/env bash
node=""
for word in "$@"; do
    case $word in --nodelist=*) node=${word#*=} ;; --*) ;; *) break ;; esac
    shift
done
echo "$node $*" >> "$CALLS"
case "$*" in
    *status*) grep -q -- --head "$CALLS"; exit ;;
    *--block) exec sleep 60 ;;
    pmdflow*)
        trap 'kill $(jobs -p); echo drained >> "$CALLS"; exit 0' TERM
        if [ -n "${HOLD:-}" ]; then sleep 60 & wait; fi
        for _ in $(seq 200); do [ "$(grep -c -- --block "$CALLS")" = 3 ] && break; sleep 0.05; done
        exit "${CODE:-0}" ;;
esac
"""


def job(directory: Path, **environment: str) -> subprocess.Popen[str]:
    """The script under way, with programs that write down how they are called."""
    programs = directory / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", f"#!/bin/sh\nprintf '%s\\n' {' '.join(NODES)}\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    own = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(directory / "calls"),
        "SLURM_JOB_NODELIST": "n[1-3]",
    }
    return subprocess.Popen(
        ["bash", str(SLURM), "cluster.yaml", "run.name=mine"],
        env={"HOME": str(directory), "RAY_WAIT_S": "0.1", **own, **environment}, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def calls(directory: Path) -> list[str]:
    file = directory / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("code", ["0", "3"])
def test_slurm_starts_a_head_then_workers_then_the_run_and_ends_as_it_does(tmp_path: Path, code: str) -> None:
    process = job(tmp_path, CODE=code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == int(code), errors
    said = [line for line in calls(tmp_path) if "status" not in line]
    assert said[0].startswith("n1 ray start --head") and "--port=6379 --block" in said[0]
    assert {line for line in said if "--address=n1:6379 --block" in line} == {
        f"{node} ray start --address=n1:6379 --block" for node in NODES[1:]
    }
    assert "n1 pmdflow up cluster.yaml cluster.address=n1:6379 run.name=mine" in said


def test_sigterm_of_slurm_drains_the_run(tmp_path: Path) -> None:
    process = job(tmp_path, HOLD="1")
    deadline = time.monotonic() + 60
    while not any("pmdflow up" in line for line in calls(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # its trap is set
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "drained" in calls(tmp_path), errors
    assert process.returncode == 0


def test_the_kubernetes_example_is_whole() -> None:
    service, pods = yaml.safe_load_all((CONFIGS / "deploy" / "kubernetes.yaml").read_text())
    spec: dict[str, Any] = pods["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert service["metadata"]["name"] == pods["spec"]["serviceName"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])
    assert spec["terminationGracePeriodSeconds"] > 30, "a drain takes run.drain_s"
    assert subprocess.run(["bash", "-n", "-c", container["args"][0]], check=False).returncode == 0
