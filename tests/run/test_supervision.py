"""New weights that an actor cannot take are told, offered again, and in the end taken by another process of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from pmdflow.config.load import load
from pmdflow.errors import ActorDied, LearnerDied, PmdflowError, WaitTimeout
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.metrics.report import ActorReport, Event
from pmdflow.run.learner_group import LearnerGroup
from pmdflow.run.loops import Loop
from pmdflow.run.supervision import MAX_REFUSED, Supervisor
from pmdflow.run.telemetry import Telemetry
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import answers
from pmdflow.weights.transport import WeightsHandle
from tests.support.paths import CONFIGS

pytestmark = pytest.mark.timeout(300)
DEADLINE_S = 120.0


class Worker:
    """An actor of which only the taking of weights is told; `script` says what becomes of each offer, by process."""

    def __init__(self, script: list[str]) -> None:
        self._script = script
        self._stopped = False
        self._told: list[Event] = []

    def run(self) -> None:
        while not self._stopped:
            time.sleep(0.05)
        self._told.append(Event(kind="last_word", message="it was to end"))

    def stop(self) -> None:
        self._stopped = True

    def drain(self) -> ActorReport:
        told, self._told = self._told, []
        return ActorReport(spans=[], events=told, tokens={})

    def update_weights(self, handle: WeightsHandle, timeout_s: float) -> bool:
        what = self._script.pop(0) if self._script else "take"
        if what == "refuse":
            raise PmdflowError("no room for them")
        if what == "hang":
            time.sleep(DEADLINE_S)
        return True


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    (tmp_path / "logs").mkdir()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    groups = dict.fromkeys(("lease", "append", "score", "claim", "read", "evict"), 2)
    actor: Any = ray.remote(num_cpus=0, concurrency_groups=groups, max_concurrency=4)(StoreActor)
    settings = {"groups_per_iteration": 1, "lookahead": 0, "max_staleness": None}
    store = actor.remote(directory=str(tmp_path / "store"), settings=settings, steps_per_iteration=1, seed=0)
    live = LiveView(
        config=load(CONFIGS / "quickstart.yaml").config, dashboard_url=None, console=Console(file=StringIO())
    )
    yield Supervisor(store=store, telemetry=Telemetry(recorder=Recorder(tmp_path), live=live))
    ray.shutdown()


def start(supervisor: Supervisor, *scripts: list[str]) -> Loop:
    """A loop whose processes follow the scripts, one each."""
    left = [*scripts]

    def make(weights: WeightsHandle | None, worker: str) -> Any:
        remote: Any = ray.remote(num_cpus=0, max_concurrency=8)(Worker)
        process = remote.remote(left.pop(0) if left else [])
        return process, process.run.remote()

    loop = Loop(name="rollout-0", start=make, takes_weights=True, hang_timeout_s=60.0)
    supervisor.start_loop(loop)
    return loop


def until(supervisor: Supervisor, condition: Any, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        supervisor.tick()
        time.sleep(0.05)


def events(run: Path, kind: str) -> list[str]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if line["kind"] == kind]


HANDLE = WeightsHandle(version=3, location=None)


def test_a_refused_offer_is_told_and_made_again(supervisor: Supervisor, tmp_path: Path) -> None:
    loop = start(supervisor, ["refuse"])
    supervisor.offer_weights(HANDLE, timeout_s=60.0)
    until(supervisor, lambda: loop.process.uses == HANDLE.version, "the second offer")
    assert (loop.starts, loop.process.refused) == (1, 0)
    (message,) = events(tmp_path, "weights_failed")
    assert message == "rollout-0: it could not take version 3: no room for them; offering it again"


def test_who_cannot_take_them_is_replaced(supervisor: Supervisor, tmp_path: Path) -> None:
    loop = start(supervisor, ["refuse"] * MAX_REFUSED)
    supervisor.offer_weights(HANDLE, timeout_s=60.0)
    until(supervisor, lambda: loop.starts == 2, "another process")
    assert len(events(tmp_path, "weights_failed")) == MAX_REFUSED - 1
    assert "could not take version 3" in events(tmp_path, "actor_died")[0]


def test_who_takes_none_for_too_long_is_replaced(supervisor: Supervisor, tmp_path: Path) -> None:
    loop = start(supervisor, ["hang", "hang"])
    supervisor.offer_weights(HANDLE, timeout_s=0.5)
    supervisor.offer_weights(WeightsHandle(version=4, location=None), timeout_s=0.5)
    until(supervisor, lambda: loop.starts == 2, "another process")
    assert "taken no weights for" in events(tmp_path, "actor_died")[0]


def test_a_call_that_is_late_or_whose_actor_is_dead_is_told_by_its_name(supervisor: Supervisor) -> None:
    loop = start(supervisor, ["hang"])
    late = [loop.process.actor.update_weights.remote(HANDLE, 1.0)]
    with pytest.raises(WaitTimeout, match=r"taking them was not done within 0\.5 s"):
        answers(late, what="taking them", timeout_s=0.5)
    ray.kill(loop.process.actor)
    with pytest.raises(ActorDied, match="while taking them was awaited"):
        answers(late, what="taking them", timeout_s=60.0)


def test_the_last_report_of_who_is_to_end_is_taken(supervisor: Supervisor, tmp_path: Path) -> None:
    one = start(supervisor, [])
    until(supervisor, lambda: one.process.answered and one.process.drain_ref is not None, "a report before the last")
    supervisor.retire(one)
    until(supervisor, lambda: one not in supervisor.loops, "its end")
    assert len(events(tmp_path, "last_word")) == 1
    other = start(supervisor, [])
    until(supervisor, lambda: other.process.answered, "the next one")
    supervisor.stop_loops(timeout_s=DEADLINE_S)
    assert len(events(tmp_path, "last_word")) == 2
    dead = start(supervisor, [])
    until(supervisor, lambda: dead.process.answered, "another one")
    ray.kill(dead.process.actor)
    supervisor.stop_loops(timeout_s=DEADLINE_S)
    assert len(events(tmp_path, "last_word")) == 2


class Rank:
    """A learner rank of which only the first answer is told; it may be its last one."""

    def __init__(self, dies: bool) -> None:
        self._dies = dies

    def device_info(self) -> dict[str, Any]:
        if self._dies:
            os._exit(1)
        return {"device": "made up"}

    def drain(self) -> ActorReport:
        return ActorReport(spans=[])


def test_ranks_of_which_one_dies_at_once_keep_no_place(supervisor: Supervisor) -> None:
    remote: Any = ray.remote(num_cpus=1)(Rank)
    told: list[dict[str, Any]] = []
    dies = iter([True, False, False, False])

    def begin() -> list[Any]:
        return [remote.remote(next(dies)) for _ in range(2)]

    learners = LearnerGroup(supervisor=supervisor, start=begin, on_device=told.append)
    with pytest.raises(LearnerDied):
        learners.restart()
    learners.restart()  # Ray has two CPUs
    assert told == [{"device": "made up"}]
    supervisor.stop_learners()
