"""Where a run's store lies: in the run directory, or on a local disk of one node, which the run directory records."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pmdflow import durable
from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError
from pmdflow.run.placement import ActorOptions

RECORD = "store.json"
"""The file in the run directory; `store` beside it is a link to the folder, for who looks in on that node."""

NODE_TIMEOUT_S = 60.0
"""How long a resume waits for the node of its store to join Ray."""
_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A folder on a local disk, and what its node is called."""

    directory: str
    node: str
    """Ray's name of the node: its address, or what `ray start --node-name` said."""
    host: str
    """Name of the machine: another Ray there reaches the same disk."""

    @classmethod
    def of(cls, run: Path) -> Self | None:
        """What the run directory says; None if its store is in it."""
        path = run / RECORD
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise LaunchError(
                f"{path} does not say where the store lies: {error}",
                hint="write it again: directory, node and host, as strings",
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlace:
    """Where the store actor opens the store."""

    directory: Path
    node: str | None
    """Ray's id of the node that it is pinned to; None: this one, and another if that is lost."""

    def options(self) -> ActorOptions:
        """Those of an actor that opens it."""
        here, is_soft = ray.get_runtime_context().get_node_id(), self.node is None
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(self.node or here, is_soft)}

    @classmethod
    def find(cls, config: Config, run: Path, *, timeout_s: float = NODE_TIMEOUT_S) -> Self:
        """The place of a run's store; that of a new run with `store.dir` is on this node, and recorded.

        Raises:
            LaunchError: the store lies elsewhere than `store.dir` says, the folder has another run's, or its node does
                not join Ray in time.
        """
        record, wanted = _Record.of(run), _wanted(config)
        lies = run / "store" if record is None else Path(record.directory)
        if record is None and wanted is None:
            return cls(directory=lies, node=None)
        if (record is not None or os.path.lexists(lies)) and lies != wanted:
            said = "null" if config.store.dir is None else config.store.dir
            raise LaunchError(
                f"store.dir is {said}, but the store of {run} lies in {lies}",
                hint="resume with the store.dir that the run was begun with, or choose another run.name",
            )
        if record is None:
            record = _begin(Path(str(wanted)), run)
        if not os.path.lexists(run / "store"):
            (run / "store").symlink_to(record.directory)
            durable.sync(run)
        return cls(directory=Path(record.directory), node=_await_node(record, run, timeout_s))


def _wanted(config: Config) -> Path | None:
    if config.store.dir is None:
        return None
    return Path(config.store.dir).expanduser().absolute() / config.run.name


def _begin(directory: Path, run: Path) -> _Record:
    if directory.exists():
        raise LaunchError(
            f"store.dir: {directory} is there already, and {run} does not say that it is this run's store",
            hint="choose another run.name or store.dir, or delete the folder",
        )
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    record = _Record(directory=str(directory), node=node["NodeName"], host=node["NodeManagerHostname"])
    durable.write(run / RECORD, json.dumps(asdict(record), indent=2) + "\n")
    return record


def _await_node(record: _Record, run: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        alive: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
        named = [node for node in alive if node["NodeName"] == record.node]
        for node in named or [node for node in alive if node["NodeManagerHostname"] == record.host]:
            return str(node["NodeID"])
        if time.monotonic() > deadline:
            there = ", ".join(sorted(f"{node['NodeName']} ({node['NodeManagerHostname']})" for node in alive))
            raise LaunchError(
                f"the store of {run} lies in {record.directory} on node {record.node} ({record.host}), which has not "
                f"joined Ray within {timeout_s:g} s; nodes: {there}",
                hint="start Ray there, or move the folder to another node and name that one in " + str(run / RECORD),
            )
        time.sleep(_POLL_S)
