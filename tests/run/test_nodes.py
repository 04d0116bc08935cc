"""What is looked at on every node before anything starts: a table of faults, each told with its remedy at once."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pmdflow.errors import LaunchError
from pmdflow.run import cluster as cluster_module
from pmdflow.run import nodes
from pmdflow.run.cluster import ask_cluster
from pmdflow.run.nodes import NodeView, node_problems, require_nodes, worker_environment

SOUND = NodeView(host="here", sees_run=True, shared_bytes=8 << 30, software=(nodes._python(), version("pmdflow")))
RUN = Path("/mnt/shared/runs/r")


@pytest.mark.parametrize(
    ("view", "said", "remedy"),
    [
        (replace(SOUND, sees_run=False), "run.dir: here does not see /mnt/shared/runs/r", "shared by all nodes"),
        (
            replace(SOUND, shared_bytes=1 << 30),
            "1.0 GiB free, the published versions that a node holds need 3.0 GiB",
            "--shm-size",
        ),
        (replace(SOUND, software=("3.9", "0.0.1")), "here has Python 3.9 and pmdflow 0.0.1", "the same environment"),
    ],
)
def test_each_fault_of_a_node_is_named_with_its_remedy(view: NodeView, said: str, remedy: str) -> None:
    ((text, hint),) = node_problems([SOUND, view], run=RUN, weights_bytes=3 << 30)
    assert said in text and remedy in hint


def test_a_sound_cluster_has_no_fault() -> None:
    assert not list(node_problems([SOUND, replace(SOUND, host="there")], run=RUN, weights_bytes=3 << 30))


def test_workers_get_what_settles_how_nodes_talk_and_no_secret() -> None:
    here = {"NCCL_DEBUG": "INFO", "HF_HOME": "/mnt/hf", "HF_TOKEN": "hf_x", "PATH": "/bin", "WANDB_API_KEY": "w"}
    assert worker_environment(here, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_DEBUG": "WARN"}) == {
        "NCCL_DEBUG": "WARN", "HF_HOME": "/mnt/hf", "GLOO_SOCKET_IFNAME": "eth1",
    }  # fmt: skip


def test_a_missing_token_is_told_with_how_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "RuntimeError: Authentication failed: Unauthenticated: Invalid or missing authentication token"
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=f"Traceback\n{said}\n")
    monkeypatch.setattr(cluster_module.subprocess, "run", lambda *given, **named: done)
    with pytest.raises(LaunchError, match="missing authentication token") as caught:
        ask_cluster("head:6379")
    assert "copy ~/.ray/auth_token" in str(caught.value) and "RAY_AUTH_MODE=disabled" in str(caught.value)


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    """Two nodes."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    found.wait_for_nodes()
    ray.init(address=found.address, log_to_driver=False, runtime_env={"env_vars": {"NCCL_DEBUG": "WARN"}})
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.timeout(180)
def test_every_node_of_a_cluster_looks(two: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_nodes(tmp_path, weights_bytes=1000)
    assert not list(tmp_path.iterdir()), "the mark is taken away"
    started = time.monotonic()
    with pytest.raises(LaunchError, match="the published versions that a node holds need") as caught:
        require_nodes(tmp_path, weights_bytes=1 << 60)
    assert str(caught.value).count("GiB free") == 2 and time.monotonic() - started < 60
    monkeypatch.setattr(Path, "touch", lambda self: None)  # as on a folder that is not shared
    with pytest.raises(LaunchError, match=r"run\.dir: .* does not see"):
        require_nodes(tmp_path, weights_bytes=None)


@pytest.mark.timeout(180)
def test_workers_of_every_node_have_the_environment(two: Cluster) -> None:
    found = ray.remote(num_cpus=1)(lambda: os.environ.get("NCCL_DEBUG"))
    assert set(ray.get([found.remote() for _ in range(2)], timeout=90)) == {"WARN"}
