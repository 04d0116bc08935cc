"""With one policy version a trajectory: whose weights are kept, and which version each rollout actor serves."""

from __future__ import annotations

from collections.abc import Iterable

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.rollout.actor import RolloutActor
from pmdflow.run.loops import Loop, is_ready
from pmdflow.run.scheduler import serve
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import StoreHandle, answers, call
from pmdflow.weights.transport import WeightsHandle

FETCH_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0
UNKNOWN = -1
"""What an actor serves whose last offer failed: it is offered a version again."""


class LiveVersions:
    """Keeps the weights of versions that have not drained, and sends rollout actors where they are needed.

    Consumes: what the store has in flight, asked for once a tick. Produces: offers of weights. It never waits.
    """

    def __init__(self, *, store: StoreHandle, slots: int) -> None:
        """Keep nothing yet; `slots` are the sequences that a rollout actor generates at a time."""
        self._store = store
        self._slots = slots
        self._handles: dict[int, WeightsHandle] = {}
        self._asked: tuple[int, ObjectRef[dict[int, int]]] | None = None
        """The newest version at the question, and the answer to come."""

    @classmethod
    def of(cls, config: Config, store: StoreHandle) -> LiveVersions | None:
        """For a configuration; None where trajectories go on under newer versions."""
        if config.scheduler.versions is None:
            return None
        return cls(store=store, slots=config.rollout.slots or DEFAULT_SLOTS)

    def add(self, handle: WeightsHandle) -> None:
        """A version is published."""
        self._handles[handle.version] = handle

    def tick(self, loops: Iterable[Loop]) -> None:
        """Take the store's answer if it is there, act on it, and ask again."""
        if not self._handles:
            return
        if self._asked is not None:
            newest, answer = self._asked
            if not is_ready(answer):
                return
            (in_flight,) = answers([answer], what="what is in flight", timeout_s=ANSWER_TIMEOUT_S)
            oldest = min([newest, *in_flight])  # a version that is not the newest begins nothing: it has drained
            self._handles = {version: handle for version, handle in self._handles.items() if version >= oldest}
            self._assign(in_flight, [loop for loop in loops if loop.takes_weights])
        # Said each time: a store actor that was restarted has forgotten it. Whatever is older is lost.
        call(self._store, StoreActor.set_oldest, min(self._handles))
        self._asked = max(self._handles), call(self._store, StoreActor.in_flight)

    def _assign(self, in_flight: dict[int, int], loops: Iterable[Loop]) -> None:
        processes = {loop.process.worker: loop.process for loop in loops}
        for process in processes.values():
            if process.offer is not None and is_ready(process.offer):
                try:
                    is_served = ray.get(process.offer, timeout=ANSWER_TIMEOUT_S)
                except RayError:  # of an actor that dies, or that could not fetch them
                    is_served = False
                process.offer = None
                process.serves = process.serves if is_served else UNKNOWN
        known = {version: number for version, number in in_flight.items() if version in self._handles}
        serving = {
            worker: process.serves for worker, process in processes.items() if process.evaluates not in self._handles
        }  # also who is to evaluate a version that nobody has any more: another one ends that
        wanted = {
            worker: process.evaluates for worker, process in processes.items() if process.evaluates in self._handles
        }
        wanted |= serve(known, serving, newest=max(self._handles), slots=self._slots)
        for worker, version in wanted.items():
            process = processes[worker]
            if version not in (process.serves, UNKNOWN) and process.offer is None:
                process.serves = version
                process.offer = call(
                    process.actor, RolloutActor.update_weights, self._handles[version], FETCH_TIMEOUT_S
                )
