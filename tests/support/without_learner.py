"""A run without controller and learner: the real store, supervisor, rollout and reward actors, and random tokens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from rich.console import Console

from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.data.prompts import make_prompts
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.run.actors import LoopMaker, start_ray, start_store
from pmdflow.run.held_out import HeldOut
from pmdflow.run.loops import Loop
from pmdflow.run.placement import place_rollouts
from pmdflow.run.scaling import Scaling
from pmdflow.run.supervision import Supervisor
from pmdflow.run.telemetry import Telemetry
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import call
from pmdflow.types import Quota
from pmdflow.weights.file import NamedTensors
from pmdflow.weights.filesystem import FilesystemTransport
from tests.support.paths import CONFIGS
from tests.support.runs import read_lines

DEADLINE_S = 100.0
LEASE_TTL_S = 15.0


def configured(directory: Path, *overrides: str) -> Config:
    """Two rollout actors that make random tokens, of which one evaluates after each iteration."""
    given = [
        f"run.dir={directory}", "run.iterations=1000", "rollout.engine=simulated", "rollout.actors=2",
        "rollout.slots=4", "eval.every=1", "weights.transport=filesystem", f"rollout.lease_ttl_s={LEASE_TTL_S}",
        "data.max_tokens=400",
    ]  # fmt: skip
    return settle(load(CONFIGS / "quickstart.yaml", [*given, *overrides]).config, gpus=None)


class WithoutLearner:
    """What a controller has; the test says what is trained and published."""

    def __init__(self, config: Config) -> None:
        """Start every actor of `config` but the learner; Ray is started."""
        self.config = config
        self.run = Path(config.run.dir) / config.run.name
        (self.run / "logs").mkdir(parents=True)
        live = LiveView(config=config, dashboard_url=None, console=Console(file=StringIO()))
        self.store = start_store(config, self.run)
        self.supervisor = Supervisor(store=self.store, telemetry=Telemetry(recorder=Recorder(self.run), live=live))
        self.version = 0
        self._weights = FilesystemTransport(self.run / "weights")
        self._prompts = make_prompts(config)
        self._cursors = itertools.count()
        self.ask(StoreActor.publish, 0, None, {})
        self._grant()
        maker = LoopMaker(config, self.run, self.store, place_rollouts(config))
        for loop in maker.all():
            self.supervisor.start_loop(loop)
        Scaling(run=self.run, supervisor=self.supervisor, configured=2, maker=maker)
        self.until(lambda: all(loop.has_answered for loop in self.supervisor.loops), "all actors")

    def held_out(self, *overrides: str) -> HeldOut:
        """Evaluation under other settings, as a process that begins now has it."""
        self.until(lambda: not self.evaluating(), "the end of what is evaluated")
        watchers = self.supervisor.watchers
        watchers[:] = [watcher for watcher in watchers if not isinstance(getattr(watcher, "__self__", None), HeldOut)]
        config = configured(Path(self.config.run.dir), *overrides)
        prompts = make_prompts(config)
        return HeldOut(config=config, supervisor=self.supervisor, prompts=prompts, run_dir=self.run)

    def ask(self, method: Any, *arguments: Any) -> Any:
        """One call of the store."""
        return self.supervisor.get(call(self.store, method, *arguments), what="the store")

    def admit(self, groups: int) -> None:
        """Something to train on."""
        cursors = itertools.islice(self._cursors, groups)
        batch = [(f"train-{cursor}", cursor, self._prompts.prompt(cursor)) for cursor in cursors]
        self.ask(StoreActor.admit, batch, "train", 8, 400)

    def publish(self, held_out: HeldOut | None = None) -> int:
        """The next version, which is evaluated by `held_out`; its number."""
        self.version += 1
        handle = self._weights.publish(self.version, NamedTensors.of({"weight": torch.full((4,), float(self.version))}))
        self.ask(StoreActor.publish, self.version, None, {})
        self._grant()
        self.supervisor.offer_weights(handle, timeout_s=60.0)
        if held_out is not None:
            held_out.published(self.version, self.version)
        return self.version

    def _grant(self) -> None:
        quota = Quota(version=self.version, groups=10**6, tokens=10**9, tokens_per_segment=None)
        self.ask(StoreActor.set_quota, quota)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Watch over the actors until a condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, (what, read_lines(self.run / "events.jsonl")[-20:])
            self.supervisor.idle(0.02)

    def ticks(self, number: int) -> None:
        """Let so many looks at all actors pass."""
        for _ in range(number):
            before = self.supervisor._last_tick
            self.until(lambda before=before: self.supervisor._last_tick > before, "a tick")

    def rounds(self) -> list[dict[str, Any]]:
        """Records of evaluation."""
        return [line for line in read_lines(self.run / "metrics.jsonl") if line["kind"] == "eval"]

    def events(self, kind: str) -> list[str]:
        """Messages of a kind."""
        return [line["message"] for line in read_lines(self.run / "events.jsonl") if line["kind"] == kind]

    def spans(self, since: float) -> list[dict[str, Any]]:
        """Those of rollout actors that began after a unix second."""
        found = read_lines(self.run / "spans.jsonl")
        return [span for span in found if span["actor"].startswith("rollout") and span["start"] > since]

    def evaluating(self) -> list[str]:
        """Names of the actors that evaluate."""
        return [loop.name for loop in self.supervisor.loops if loop.process.evaluates is not None]

    def loop(self, name: str) -> Loop:
        """The actor of a name."""
        (found,) = [loop for loop in self.supervisor.loops if loop.name == name]
        return found

    def process(self, name: str) -> psutil.Process:
        """Its process."""
        known = ray._private.state.actors(self.loop(name).process.actor._actor_id.hex())
        return psutil.Process(int(known["Pid"]))


@contextmanager
def without_learner(directory: Path, *overrides: str) -> Iterator[WithoutLearner]:
    """Start Ray and everything; ends it."""
    config = configured(directory, *overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # Ray's processes inherit it
        start_ray(config)
    try:
        yield WithoutLearner(config)
    finally:
        ray.shutdown()
