"""The nodes of a cluster, looked at before any actor starts: shared folder, memory for weights, software."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pmdflow.errors import LaunchError

LOOK_S = 50.0
"""Every node has looked within this time, that for starting a process there included."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where Linux mounts it
"""Where Ray keeps its objects and a node its published weights."""
FORWARDED = ("NCCL_", "TORCH_NCCL_", "GLOO_", "PYTORCH_", "HF_", "VLLM_", "OMPI_", "UCX_")
"""Beginnings of the variables that workers on all nodes get from the process that starts the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """What one node says of itself."""

    host: str
    sees_run: bool
    """The run directory, by a file that was just put there."""
    shared_bytes: int
    """Free in `/dev/shm`."""
    software: tuple[str, str]
    """Versions of Python and pmdflow."""


def worker_environment(environment: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Variables of every worker process: those of `environment` that settle how nodes talk, then `own`."""
    forwarded = {name: value for name, value in environment.items() if name.startswith(FORWARDED)}
    secret = ("TOKEN", "SECRET", "PASSWORD", "KEY")
    return {name: value for name, value in forwarded.items() if not name.endswith(secret)} | dict(own)


def require_nodes(run: Path, *, weights_bytes: int | None) -> None:
    """Refuse a cluster with a node that does not see the run directory, or cannot hold its weights; Ray is joined.

    Args:
        run: The run directory, which is there.
        weights_bytes: Of the published versions that a node holds at a time; None if that is not known.

    Raises:
        LaunchError: names the nodes, what is wrong there, and the remedy.
    """
    mark = run / f".node-check-{uuid.uuid4().hex}"
    mark.touch()
    nodes = {str(node["NodeID"]): str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]}
    try:
        look: Any = ray.remote(num_cpus=0, max_retries=0)(_look)
        asked = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(mark))
            for node in nodes
        ]
        _, silent = ray.wait(asked, num_returns=len(asked), timeout=LOOK_S)
        if silent:
            hosts = ", ".join(host for ref, host in zip(asked, nodes.values(), strict=True) if ref in silent)
            raise LaunchError(
                f"{hosts}: Ray started no process there within {LOOK_S:g} s",
                hint="look at `ray status`, and there at /tmp/ray/session_latest/logs",
            )
        views: list[NodeView] = ray.get(asked, timeout=LOOK_S)
    except RayTaskError as error:
        raise LaunchError(
            f"a node cannot run pmdflow: {error.cause}", hint="install the same environment on every node"
        ) from error
    except GetTimeoutError as error:
        raise LaunchError(f"a node did not answer within {LOOK_S:g} s", hint="look at `ray status`") from error
    finally:
        mark.unlink(missing_ok=True)
    if problems := list(node_problems(views, run=run, weights_bytes=weights_bytes)):
        raise LaunchError("\n".join(text for text, _ in problems), hint="\n".join(dict(problems).values()))


def node_problems(views: Sequence[NodeView], *, run: Path, weights_bytes: int | None) -> Iterator[tuple[str, str]]:
    """What is wrong with the nodes, each with its remedy."""
    blind = sorted({view.host for view in views if not view.sees_run})
    if blind:
        yield (
            f"run.dir: {', '.join(blind)} does not see {run}",
            "set run.dir to a folder that is shared by all nodes under the same path (NFS, Lustre)",
        )
    here = (_python(), version("pmdflow"))
    for view in views:
        if view.software != here:
            had = " and ".join(f"{name} {one}" for name, one in zip(("Python", "pmdflow"), view.software, strict=True))
            yield (
                f"{view.host} has {had}, this machine Python {here[0]} and pmdflow {here[1]}",
                "install the same environment on every node, for example the shared one by its path",
            )
        if weights_bytes is not None and view.shared_bytes < weights_bytes:
            free, need = (f"{size / 2**30:.1f} GiB" for size in (view.shared_bytes, weights_bytes))
            yield (
                f"{view.host}: {SHARED_MEMORY} has {free} free, the published versions that a node holds need {need}",
                f"mount it larger (docker run --shm-size, or an emptyDir of medium Memory at {SHARED_MEMORY})",
            )


def _look(mark: str) -> NodeView:
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    software = (_python(), version("pmdflow"))
    return NodeView(host=socket.gethostname(), sees_run=Path(mark).exists(), shared_bytes=free, software=software)


def _python() -> str:
    return ".".join(map(str, sys.version_info[:2]))
