"""An environment whose trajectory is given back waits for its next lease, and is closed when another takes it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from pmdflow.config.load import load
from pmdflow.environments.protocol import Observation
from pmdflow.rollout.engines.simulated import SimulatedEngine
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.store import TrajectoryStore
from pmdflow.types import Prompt, Quota
from tests.support.paths import ROOT

STOPS = f"rollout.stop_token_ids=[{SimulatedEngine.EOS}]"
CONFIG = load(ROOT / "configs" / "calculator.yaml", [STOPS, "environment.timeout_s=60"]).config


class Talks:
    """Never ends."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.closed = threading.Event()

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        self.calls.append(key)
        return Observation(text="1", key="begun")

    def step(self, *, key: str, action: str) -> Observation:
        self.calls.append(key)
        return Observation(text="2", reward=1.0)

    def close(self) -> None:
        self.closed.set()


class Worker:
    """One that generates a version's budget."""

    def __init__(self, name: str, store: TrajectoryStore) -> None:
        self.name, self.store, self.made = name, store, list[Talks]()
        self.engine = SimulatedEngine(num_slots=2, seed=1, median_tokens=3.0)
        self.taker = LeaseTaker(CONFIG, None, store.trajectory, most_parked=2)
        vars(self.taker)["_environment"] = self.make
        self.holder = Holder(self.engine, self.taker)

    def make(self) -> Talks:
        self.made.append(Talks())
        return self.made[-1]

    def generate(self, version: int) -> None:
        self.store.publish(version)
        self.store.set_quota(Quota(version=version, groups=1, tokens=12, tokens_per_segment=None))
        self.engine.load_weights(version, {}, on_new_weights="keep_kv")
        for lease in self.store.lease(self.name, version, 2, 0.0):
            self.holder.join(lease, grant=lease.grant)
        assert len(self.holder) == 1
        while len(self.holder):
            self.holder.fill_slots()
            if self.engine.active():
                self.holder.step()
            self.holder.wait_answer()
            self.holder.take_answers()
            segments = self.holder.segments(next_version=version)
            for note in self.holder.notes():
                self.store.turn(*note, wait=False)
            for held in self.holder.resume(self.store.append(segments)[1]):
                self.taker.let_go(held, stays=True)


def test_it_waits_and_is_closed_when_another_goes_on() -> None:
    store = TrajectoryStore(None, groups_per_iteration=1, lookahead=0, max_staleness=None, grant_tokens=4)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=1, tokens=12, tokens_per_segment=None))
    prompt = Prompt(id="0", text="", tokens=np.array([5, 6], np.int32))
    store.admit("0", prompt, cursor=0, group_size=1, max_tokens=400)
    first, other = Worker("first", store), Worker("other", store)
    first.generate(1)
    assert first.taker.parked() == {0: 1} == store.epochs([0])
    before = len(first.made[0].calls)
    first.generate(2)
    assert len(first.made) == 1 and before < len(first.made[0].calls) == len(set(first.made[0].calls))
    other.generate(3)
    assert first.taker.parked() == {0: 2} and store.epochs([0]) == {0: 3}
    assert other.made[0].calls[: len(first.made[0].calls)] == first.made[0].calls, "it went the recorded way"
    first.taker.drop(0)
    assert first.made[0].closed.wait(30)
    other.taker.close_environments()
    assert other.made[0].closed.is_set()
    notes = store.trajectory(0)["turns"]
    assert notes[0] == (0, {}, "begun") and len(notes) == len(other.made[0].calls)
    store.close()


def test_so_many_wait_and_of_more_the_one_that_has_waited_longest_is_closed() -> None:
    store = TrajectoryStore(None, groups_per_iteration=1, lookahead=0, max_staleness=None)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=1, tokens=1000, tokens_per_segment=None))
    prompt = Prompt(id="0", text="", tokens=np.array([5, 6], np.int32))
    store.admit("0", prompt, cursor=0, group_size=4, max_tokens=400)
    worker = Worker("first", store)
    for lease in store.lease("first", 0, 4, 0.0):
        worker.holder.join(lease, grant=lease.grant)
        worker.holder.wait_answer()
        worker.holder.take_answers()
        worker.holder.resume(store.append(worker.holder.segments(next_version=0))[1])
        worker.holder.abort()
        for held in worker.holder.resume(store.append(worker.holder.segments(next_version=0))[1]):
            worker.taker.let_go(held, stays=True)
    assert list(worker.taker.parked()) == [2, 3]
    assert all(one.closed.wait(30) for one in worker.made[:2])
    assert not any(one.closed.is_set() for one in worker.made[2:])
    worker.taker.close_environments()
    store.close()
