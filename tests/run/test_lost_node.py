"""Two Ray nodes, of which one is lost: what was there waits for a place, and the rest goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from pmdflow.config.load import load
from pmdflow.errors import PmdflowError
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.metrics.report import ActorReport
from pmdflow.run import supervision
from pmdflow.run.loops import Loop
from pmdflow.run.supervision import Supervisor
from pmdflow.run.telemetry import Telemetry
from pmdflow.store.actor import StoreActor
from pmdflow.weights.transport import WeightsHandle
from tests.support.paths import CONFIGS

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(300)]
DEADLINE_S = 120.0


class Worker:
    """An actor that does nothing but stay, and take weights."""

    def __init__(self) -> None:
        self._version = 0

    def run(self) -> None:
        while True:
            time.sleep(0.05)

    def drain(self) -> ActorReport:
        return ActorReport(spans=[], events=[], tokens={"version": self._version})

    def version(self) -> int:
        return self._version

    def update_weights(self, handle: WeightsHandle, timeout_s: float) -> bool:
        self._version = handle.version
        return True


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def supervisor(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    monkeypatch.setattr(supervision, "STARTUP_TIMEOUT_S", 20.0)  # far more than the lost node's wait in these tests
    monkeypatch.setattr(supervision, "PLACE_S", 1.0)
    groups = dict.fromkeys(("lease", "append", "score", "claim", "read", "evict"), 2)
    actor: Any = ray.remote(num_cpus=0, concurrency_groups=groups, max_concurrency=4)(StoreActor)
    settings = {"groups_per_iteration": 1, "lookahead": 0, "max_staleness": None}
    store = actor.remote(directory=str(tmp_path / "store"), settings=settings, steps_per_iteration=1, seed=0)
    ray.get(store.counts.remote(), timeout=DEADLINE_S)
    config = load(CONFIGS / "quickstart.yaml").config
    live = LiveView(config=config, dashboard_url=None, console=Console(file=StringIO()))
    return Supervisor(store=store, telemetry=Telemetry(recorder=Recorder(tmp_path), live=live))


def start(supervisor: Supervisor, index: int) -> Loop:
    def make(weights: WeightsHandle | None, worker: str) -> Any:
        remote: Any = ray.remote(num_cpus=1, max_concurrency=8)(Worker)
        process = remote.remote()
        return process, process.run.remote()

    loop = Loop(name=f"rollout-{index}", start=make, takes_weights=True, hang_timeout_s=60.0, needs="1 CPUs and 0 GPUs")
    supervisor.start_loop(loop)
    return loop


def until(supervisor: Supervisor, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        supervisor.tick()
        time.sleep(0.05)


def told(run: Path, kind: str) -> list[str]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if line["kind"] == kind]


def versions(loops: list[Loop]) -> list[int]:
    return [ray.get(loop.process.actor.version.remote(), timeout=DEADLINE_S) for loop in loops]


def test_the_rest_goes_on_and_what_was_lost_comes_back_with_the_node(
    supervisor: Supervisor, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = cluster.add_node(num_cpus=1)
    loops = [start(supervisor, 0), start(supervisor, 1)]
    until(supervisor, lambda: all(loop.has_answered for loop in loops), "both actors")
    supervisor.offer_weights(WeightsHandle(version=1, location=None), timeout_s=30.0)
    until(supervisor, lambda: [loop.process.uses for loop in loops] == [1, 1], "version 1")

    cluster.remove_node(node)
    until(supervisor, lambda: bool(told(tmp_path, "actor_waits")), "that one has no place")
    (lost,) = [loop for loop in loops if loop.starts == 2]
    (kept,) = [loop for loop in loops if loop.starts == 1]
    (message,) = told(tmp_path, "actor_waits")
    assert message.startswith(f"{lost.name} waits for a place: it needs 1 CPUs and 0 GPUs, free are 0 CPU")
    monkeypatch.setattr(supervision, "STARTUP_TIMEOUT_S", 1.0)
    supervisor.offer_weights(WeightsHandle(version=2, location=None), timeout_s=30.0)
    until(supervisor, lambda: kept.process.uses == 2, "version 2 where there is somebody")
    waited = time.monotonic() + 3.0
    until(supervisor, lambda: time.monotonic() > waited, "a time after which it would have been dead")
    assert (lost.starts, lost.quick_deaths) == (2, [])

    monkeypatch.setattr(supervision, "STARTUP_TIMEOUT_S", 60.0)
    cluster.add_node(num_cpus=1)
    until(supervisor, lambda: lost.process.uses == 2, "the newest version where it is back")
    assert versions(loops) == [2, 2]
    assert told(tmp_path, "actor_placed") == [f"{lost.name} has found a place"]
    assert (lost.starts, kept.starts) == (2, 1)


def test_ranks_wait_for_a_place_by_name_while_the_rest_is_looked_after(
    supervisor: Supervisor, cluster: Cluster, tmp_path: Path
) -> None:
    loop = start(supervisor, 0)
    until(supervisor, lambda: loop.has_answered, "the actor")
    rank: Any = ray.remote(num_cpus=1)(Worker).remote()
    ticks, tick = [], supervisor.tick

    def counted() -> None:
        tick()
        ticks.append(time.monotonic())
        if len(ticks) == 4:
            assert (
                "1 of 1 learner ranks wait for a place: each needs 1 CPU, free are" in told(tmp_path, "actor_waits")[0]
            )
            cluster.add_node(num_cpus=1)

    supervisor.tick = counted  # type: ignore[method-assign]
    supervisor.await_places([rank], what="learner ranks", needs="1 CPU")
    assert ray.get(rank.version.remote(), timeout=DEADLINE_S) == 0
    assert told(tmp_path, "actor_placed") == ["all learner ranks have found a place"]

    other: Any = ray.remote(num_cpus=1)(Worker).remote()
    supervisor.tick = tick  # type: ignore[method-assign]
    supervisor.ask_to_drain()
    with pytest.raises(PmdflowError, match="1 of 1 learner ranks wait for a place"):
        supervisor.await_places([other], what="learner ranks", needs="1 CPU")
