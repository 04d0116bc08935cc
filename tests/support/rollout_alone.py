"""A rollout actor and a store without controller and learner: what is leased, generated, appended and lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.metrics.report import ActorReport
from pmdflow.run.actors import start_ray, start_rollout, start_store
from pmdflow.run.placement import place_rollouts
from pmdflow.types import Prompt, Quota

TIMEOUT_S = 300.0


@dataclass(slots=True)
class RolloutAlone:
    """The handles of the actors, in the processes that a run would give them."""

    config: Config
    directory: Path
    store: Any
    place: dict[str, Any]
    actor: Any = None
    run_ref: Any = None
    workers: int = 0

    def start_actor(self, handle: Any = None) -> None:
        """Start the actor and wait until its engine is ready."""
        self.workers += 1
        self.actor = start_rollout(
            self.config, self.directory, self.store, self.place, index=0, worker=f"rollout-0/{self.workers}"
        )
        self.run_ref = self.actor.run.remote(handle)
        self.drained()

    def drained(self) -> ActorReport:
        """What the actor answers to `drain`."""
        answer: ActorReport = ray.get(self.actor.drain.remote(), timeout=TIMEOUT_S)
        return answer

    def admit(self, prompts: list[list[int]], *, group_size: int, max_tokens: int, prefix: str = "p") -> None:
        """Admit a group for each prompt."""
        named = [(f"{prefix}-{number}", np.asarray(tokens, np.int32)) for number, tokens in enumerate(prompts)]
        rows = [(id, number, Prompt(id=id, text="", tokens=tokens)) for number, (id, tokens) in enumerate(named)]
        assert len(self.call("admit", rows, "train", group_size, max_tokens)) == len(rows)

    def publish(self, version: int, *, groups: int) -> None:
        """Make `version` the newest, with a budget that does not end."""
        self.call("publish", version, None, {})
        self.call("set_quota", Quota(version=version, groups=groups, tokens=10**9, tokens_per_segment=None))

    def call(self, method: str, *arguments: Any) -> Any:
        """One call of the store."""
        return ray.get(getattr(self.store, method).remote(*arguments), timeout=TIMEOUT_S)

    def generated(self) -> int:
        """Durable tokens."""
        return int(self.call("ledger")["generated"])

    def kill_generating(self) -> tuple[int, int]:
        """SIGKILL the actor; what it had generated one flush interval before, and in all as far as it said.

        Its engine's processes, if it has any, must end with it.
        """
        flush_s, history = self.config.rollout.flush_interval_s, []
        end = time.monotonic() + 2 * flush_s
        while time.monotonic() < end:
            count = self.drained().tokens["generated_tokens"]
            history.append((time.monotonic(), count))
            time.sleep(0.01)
        actor = next(p for p in psutil.Process().children(recursive=True) if "RolloutActor" in " ".join(p.cmdline()))
        engines = actor.children(recursive=True)
        killed = time.monotonic()
        actor.kill()
        assert psutil.wait_procs(engines, timeout=30)[1] == [], "the engine outlived its actor"
        return max(count for at, count in history if at <= killed - flush_s), history[-1][1]

    def wait_tokens(self, number: int) -> None:
        """Wait for that many more durable tokens."""
        end, deadline = self.generated() + number, time.monotonic() + 60.0
        while self.generated() < end:
            assert time.monotonic() < deadline, f"{number} more tokens were not generated"
            assert not ray.wait([self.run_ref], timeout=0.02)[0], ray.get(self.run_ref, timeout=1)

    def fence(self) -> int:
        """Take its leases from the actor that was started last; how many it held."""
        return int(self.call("fence", f"rollout-0/{self.workers}"))

    def wait_complete(self, trajectories: int) -> None:
        """Wait until that many trajectories are complete."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.call("counts").trajectories_unscored < trajectories:
            assert time.monotonic() < deadline, self.call("counts")
            assert not ray.wait([self.run_ref], timeout=0.05)[0], ray.get(self.run_ref, timeout=1)

    def stop(self) -> None:
        """Let the actor give its leases back."""
        ray.get(self.actor.stop.remote(), timeout=TIMEOUT_S)
        ray.get(self.run_ref, timeout=TIMEOUT_S)
        ray.kill(self.actor)


@contextmanager
def rollout_alone(config: Config, directory: Path) -> Iterator[RolloutAlone]:
    """Start Ray and the store; ends everything."""
    config = settle(config, gpus=None)
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # Ray's processes inherit it
        start_ray(config)
    try:
        store = start_store(config, directory)
        yield RolloutAlone(config=config, directory=directory, store=store, place=place_rollouts(config)[0])
    finally:
        ray.shutdown()
