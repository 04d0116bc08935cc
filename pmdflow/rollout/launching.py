"""Starts the agent program of a lease: what it finds in its environment, and where it runs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pmdflow.agents.diary import SUFFIX, has_died
from pmdflow.agents.keys import Credential
from pmdflow.agents.program import Program
from pmdflow.agents.sandbox import ADDRESS, Walls
from pmdflow.config.schema import Config
from pmdflow.config.variables import resolve
from pmdflow.reward.confinement import PYTHON
from pmdflow.types import Lease

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentsPlace:
    """Where the programs of a run find its gateway."""

    address: str
    """`http://HOST:PORT`."""
    secret: bytes
    """Signs their keys."""


class Launcher:
    """Of one rollout actor."""

    def __init__(
        self, config: Config, place: AgentsPlace, run_dir: Path, worker: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Start nothing yet.

        Raises:
            SandboxFailed: programs are to be confined, and cannot be here.
        """
        assert config.agents is not None
        self._agents, self._model = config.agents, config.run.name
        self._place, self._run_dir, self._worker, self._tokenizer = place, run_dir, worker, tokenizer
        self._walls = Walls.find(place.address, run_dir) if config.agents.sandbox else None

    def log(self, lease: Lease, suffix: str) -> Path:
        """A file of what the program of a lease says."""
        return self._log(lease.trajectory, lease.epoch, suffix)

    def deaths(self, lease: Lease) -> int:
        """How many programs of its trajectory were killed before, here or elsewhere, by nobody of us."""
        return sum(has_died(self._log(lease.trajectory, epoch, SUFFIX)) for epoch in range(1, lease.epoch))

    def _log(self, trajectory: int, epoch: int, suffix: str) -> Path:
        return self._run_dir / "logs" / "agents" / f"{trajectory}-{epoch}{suffix}"

    def start(self, lease: Lease) -> Program:
        """Start it, with a key for its own episode."""
        agents, place, python, env = self._agents, self._place.address, sys.executable, dict[str, str]()
        if self._walls is None:
            env = _without_proxy(place.rpartition("//")[2].rpartition(":")[0])
        else:
            place, python = ADDRESS, PYTHON
        env["OPENAI_BASE_URL"] = f"{place}/episodes/{lease.trajectory}/v1"
        env["OPENAI_API_KEY"] = Credential(self._worker, lease.trajectory, lease.epoch).key(self._place.secret)
        try:
            return Program.start(
                agents.command or [python, "-m", "pmdflow.agents.function", str(agents.program)],
                env=env,
                task={
                    "prompt": self._tokenizer.decode(lease.prompt.tolist()) if lease.text is None else lease.text,
                    "metadata": dict(lease.metadata),
                    "messages": lease.metadata.get("messages"),
                    "model": self._model,
                    "args": resolve(agents.args),
                },
                work=self._run_dir / "agents" / f"{lease.trajectory}-{lease.epoch}",
                log=self.log(lease, ".log"),
                timeout_s=agents.timeout_s,
                walls=self._walls,
            )
        except (OSError, RuntimeError) as error:  # this machine has no process or no room left: it may have later
            return Program.failed(f"it could not be started: {error}")


def _without_proxy(host: str) -> dict[str, str]:
    """The gateway is asked directly, besides whatever else is."""
    return {name: ",".join(filter(None, [os.environ.get(name), host])) for name in ("NO_PROXY", "no_proxy")}
