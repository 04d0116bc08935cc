"""Supervision: every wait of the controller watches all actors, replaces the dead and collects their reports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from pmdflow.errors import ActorDied, EngineDied, LearnerDied, PmdflowError, WaitTimeout
from pmdflow.learner.actor import LearnerActor
from pmdflow.metrics.report import ActorReport
from pmdflow.rollout.actor import RolloutActor
from pmdflow.run.live_versions import LiveVersions
from pmdflow.run.loops import Loop, LoopActor, Running, is_placed, is_ready
from pmdflow.run.placement import free_resources
from pmdflow.run.telemetry import Telemetry
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import StoreHandle, answers, call
from pmdflow.store.creation import failure_of
from pmdflow.types import Counts
from pmdflow.weights.transport import WeightsHandle

TICK_S = 1.0
ASIDE_TICK_S = 0.2
CALL_TIMEOUT_S = 120.0
"""The store answers within this time, its restart included."""
STARTUP_TIMEOUT_S = 300.0
"""An actor that has not answered once by then, after it was placed, has failed to start."""
PLACE_S = 15.0
"""An actor that has no place after this long is told of."""
PLACE_TIMEOUT_S = 24 * 3600.0
"""A node that is lost comes back within this time, or its learner ranks find room elsewhere."""
RETIRE_TIMEOUT_S = 60.0
"""An actor that is to end for good, and has not by then, is killed."""
MAX_QUICK_DEATHS = 5
"""A loop that dies this often without having answered once is given up."""
MAX_REFUSED = 3
"""A rollout actor that could not take new weights this often in a row is replaced."""
MAX_PEERS = 4
"""Actors that a handle names besides the one that published it."""
LATE_OFFERS = 2
"""Likewise one that uses none for so many times their timeout, although it was offered some."""

Answer = TypeVar("Answer")


class Supervisor:
    """Owns the actors of a run. The controller waits only through `wait` and `get`."""

    def __init__(self, *, store: StoreHandle, telemetry: Telemetry, live: LiveVersions | None = None) -> None:
        """Supervise nothing yet; the store actor is restarted by Ray itself.

        With `live` each trajectory is of one version: not every actor serves the newest.
        """
        self.store = store
        self.telemetry = telemetry
        self.learners: list[ActorHandle[LearnerActor]] = []
        self.loops: list[Loop] = []
        self.draining = False
        self.resting = False
        """The learner has the rollout actors' devices: one that starts waits for its own."""
        self.handle: WeightsHandle | None = None
        """Newest published weights; None until the first publication: those of the model folder."""
        self.watchers: list[Callable[[], None]] = []
        """Called at each tick; none may wait."""
        self._learner_drains: dict[int, ObjectRef[ActorReport]] = {}
        self._store_drain: ObjectRef[ActorReport] | None = None
        self._sample: ObjectRef[tuple[Counts, dict[str, int]]] | None = None
        self._last_tick = 0.0
        self._offer_timeout_s = 0.0
        self._live_versions = live

    def ask_to_drain(self) -> None:
        """Let the controller end after this iteration; returns at once."""
        self.draining = True
        self.telemetry.drain_asked()

    def start_loop(self, loop: Loop) -> None:
        """Create the actor of a loop and run it from the newest weights."""
        loop.starts += 1
        worker = f"{loop.name}/{loop.starts}"
        handle = None if self.handle is None or not loop.takes_weights else self._served(self.handle)
        actor, run_ref = loop.start(handle, worker)
        serves = 0 if self.handle is None else self.handle.version
        loop.running = Running(actor=actor, worker=worker, run_ref=run_ref, asked_at=time.monotonic(), serves=serves)
        if loop not in self.loops:
            self.loops.append(loop)

    @property
    def rollouts(self) -> list[Loop]:
        """Those that generate, without whoever is about to end."""
        return [loop for loop in self.loops if loop.takes_weights and loop.retired_at is None]

    def retire(self, loop: Loop) -> None:
        """Let a loop send what it has, give its leases back and end for good; returns at once."""
        loop.retired_at = time.monotonic()
        call(loop.process.actor, LoopActor.stop)

    def wait(self, refs: Sequence[ObjectRef[Answer]], *, what: str, timeout_s: float) -> list[Answer]:
        """Results of all `refs`, in order, while the actors are watched.

        Raises:
            ActorDied: an actor that answers one of them, or a learner rank, has died.
            WaitTimeout: they were not all there in time; names `what`.
        """
        deadline = time.monotonic() + timeout_s
        pending = list(refs)
        while pending:
            runs = [loop.process.run_ref for loop in self.loops]
            ray.wait([*pending, *runs], num_returns=1, timeout=TICK_S)
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=0)
            answers(done, what=what, timeout_s=STARTUP_TIMEOUT_S)
            self.tick()
            if pending and time.monotonic() > deadline:
                raise WaitTimeout(f"{what} was not done within {timeout_s:g} s")
        return answers(refs, what=what, timeout_s=STARTUP_TIMEOUT_S)

    def get(self, ref: ObjectRef[Answer], *, what: str, timeout_s: float = CALL_TIMEOUT_S) -> Answer:
        """The result of one call, waited for like those of `wait`."""
        return self.wait([ref], what=what, timeout_s=timeout_s)[0]

    def aside(self, work: Callable[[], Answer], *, what: str) -> Answer:
        """Read, write or remove files in a thread, however long it takes, while the actors are watched.

        Raises:
            PmdflowError: an actor died for good; the thread has ended before.
        """
        future: futures.Future[Answer] = futures.Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name=what, daemon=True).start()
        try:
            while not futures.wait([future], timeout=ASIDE_TICK_S).done:
                self.tick()
        except PmdflowError:
            futures.wait([future])  # or whoever recovers from this would find files half written
            raise
        return future.result()

    def tick(self) -> None:
        """Replace actors that ended; once in `TICK_S`, look after every actor and collect reports. Never waits."""
        for loop in list(self.loops):
            if loop.retired_at is not None:
                self._end_retired(loop, loop.retired_at)
            elif loop.process.ended:
                self._replace_ended(loop)
        for watcher in self.watchers:
            watcher()
        if time.monotonic() - self._last_tick < TICK_S:
            return
        self._last_tick = time.monotonic()
        for loop in [loop for loop in self.loops if loop.retired_at is None]:
            self._watch(loop)
            if self._live_versions is None:
                self._watch_offer(loop)
        for rank, learner in enumerate(self.learners):
            self._drain_learner(rank, learner)
        self._watch_store()
        if self._live_versions is not None:
            self._live_versions.tick(loop for loop in self.loops if loop.process.placed)

    def offer_weights(self, handle: WeightsHandle, *, timeout_s: float) -> None:
        """Send a published version to every rollout actor, or to as many as it needs at the next tick."""
        self.handle = handle
        if self._live_versions is not None:
            self._live_versions.add(handle)
            return
        self._offer_timeout_s = timeout_s
        for loop in self.loops:
            if loop.takes_weights and loop.process.placed:
                self._offer(loop, handle)

    def idle(self, seconds: float) -> None:
        """Let time pass while the actors are watched."""
        runs = [loop.process.run_ref for loop in self.loops]
        if runs:
            ray.wait(runs, timeout=seconds)
        else:
            time.sleep(seconds)
        self.tick()

    def stop_loops(self, *, timeout_s: float) -> None:
        """Let every loop finish what it holds; one that does not is killed, which loses only unsent tokens."""
        for loop in self.loops:
            call(loop.process.actor, LoopActor.stop)
        runs = [loop.process.run_ref for loop in self.loops]
        ray.wait(runs, num_returns=len(runs), timeout=timeout_s)
        self._last_tick, deadline = 0.0, time.monotonic() + timeout_s
        while left := [loop for loop in self.loops if not self._take_last(loop)]:
            reports = [loop.process.drain_ref for loop in left if loop.process.drain_ref is not None]
            if not ray.wait(reports, timeout=max(deadline - time.monotonic(), 0))[0]:
                break
        for loop in self.loops:
            ray.kill(loop.process.actor)
        self.loops.clear()

    def stop_learners(self) -> None:
        """Kill every learner rank; their state is the newest checkpoint."""
        for learner in self.learners:
            ray.kill(learner)
        self.learners.clear()
        self._learner_drains.clear()

    def _watch(self, loop: Loop) -> None:
        process, silent_s = loop.process, time.monotonic() - loop.process.asked_at
        is_heard = self._collect(loop)
        is_judged = process.placed or self._find_place(loop, silent_s)
        if is_heard or not is_judged or (self.resting and loop.takes_weights and not process.answered):
            return
        if silent_s > (loop.hang_timeout_s if process.answered else STARTUP_TIMEOUT_S):
            self._replace(loop, f"it did not answer for {silent_s:.0f} s")

    def _find_place(self, loop: Loop, silent_s: float) -> bool:
        """Whether a process is to be judged by its silence: it is placed, or nothing of the run has found room yet."""
        process = loop.process
        if is_placed(process.actor):
            process.placed, process.asked_at = True, time.monotonic()
            if process.missed:
                self.telemetry.event("actor_placed", f"{loop.name} has found a place", actor=loop.name)
            newest = self.handle
            if loop.takes_weights and self._live_versions is None and newest and newest.version > process.serves:
                self._offer(loop, newest)
            return False
        if silent_s > PLACE_S and not process.missed:
            process.missed = True
            what = f"{loop.name} waits for a place: it needs {loop.needs}, free are {free_resources()}"
            self.telemetry.event("actor_waits", f"{what}; the others go on", actor=loop.name)
        return not any(other.has_answered for other in self.loops if other.takes_weights == loop.takes_weights)

    def await_places(self, waiting: Sequence[ActorHandle[Any]], *, what: str, needs: str) -> None:
        """Wait until Ray has found a node for each actor, while all others go on.

        Raises:
            WaitTimeout: some have none after `PLACE_TIMEOUT_S`.
            PmdflowError: the run was asked to end.
        """
        began, is_told = time.monotonic(), False
        while left := [actor for actor in waiting if not is_placed(actor)]:
            seconds = time.monotonic() - began
            missing = f"{len(left)} of {len(waiting)} {what} wait for a place: each needs {needs}, free are "
            if seconds > PLACE_S and not is_told:
                is_told = True
                free = free_resources()
                self.telemetry.event(
                    "actor_waits", f"{missing}{free}; they start when there is room, as on a lost node"
                )
            if self.draining or seconds > PLACE_TIMEOUT_S:
                kind = PmdflowError if self.draining else WaitTimeout
                raise kind(f"{missing}{free_resources()}", hint="`pmdflow up` goes on from what is stored")
            self.idle(TICK_S)
        if is_told:
            self.telemetry.event("actor_placed", f"all {what} have found a place")

    def _collect(self, loop: Loop) -> bool:
        """Take the report that was asked for last, if it is there, and ask for the next one."""
        process = loop.process
        if process.drain_ref is not None:
            if not is_ready(process.drain_ref):
                return False
            try:
                self.telemetry.take(ray.get(process.drain_ref, timeout=TICK_S), source=process.worker)
            except RayActorError:
                return False
            process.answered = loop.has_answered = True
            loop.quick_deaths.clear()
        process.drain_ref, process.asked_at = call(process.actor, LoopActor.drain), time.monotonic()
        return True

    def _take_last(self, loop: Loop) -> bool:
        """Take what a loop that has ended has still to report; whether that was all. Never waits."""
        process = loop.process
        while process.last_reports and (process.drain_ref is None or is_ready(process.drain_ref)):
            process.last_reports = process.last_reports - 1 if self._collect(loop) else 0  # 0: it is dead
        return not process.last_reports

    def _offer(self, loop: Loop, handle: WeightsHandle) -> None:
        process = loop.process
        process.offer = call(process.actor, RolloutActor.update_weights, self._served(handle), self._offer_timeout_s)
        process.behind_since = process.behind_since or time.monotonic()

    def _served(self, handle: WeightsHandle) -> WeightsHandle:
        """The handle with actors that use its version: they have it even if who published it has died."""
        running = [loop.running for loop in self.loops if loop.takes_weights and loop.running is not None]
        users = [process.actor for process in running if process.uses == handle.version]
        return replace(handle, peers=tuple(users[:MAX_PEERS]))

    def _watch_offer(self, loop: Loop) -> None:
        """Offer weights again that an actor could not take; replace one that cannot, or uses none for too long."""
        process, handle = loop.process, self.handle
        if process.offer is None or handle is None:
            return
        behind_s = time.monotonic() - (process.behind_since or time.monotonic())
        if is_ready(process.offer):
            offer, process.offer = process.offer, None
            try:
                is_used = ray.get(offer, timeout=TICK_S)
                process.refused, process.behind_since = 0, None
                process.uses = handle.version if is_used else process.uses
            except RayActorError:
                return  # whoever watches over its loop replaces it
            except RayTaskError as error:
                process.refused += 1
                why = f"it could not take version {handle.version}: {error.cause}"
                if process.refused >= MAX_REFUSED:
                    self._replace(loop, f"{why}, {process.refused} times in a row")
                else:
                    self.telemetry.event("weights_failed", f"{loop.name}: {why}; offering it again", actor=loop.name)
                    self._offer(loop, handle)
        elif behind_s > LATE_OFFERS * self._offer_timeout_s:
            self._replace(loop, f"it has taken no weights for {behind_s:.0f} s")

    def _end_retired(self, loop: Loop, since: float) -> None:
        process = loop.process
        has_ended = process.ended and self._take_last(loop)
        if not has_ended and process.placed and time.monotonic() - since < RETIRE_TIMEOUT_S:
            return
        ray.kill(process.actor)
        call(self.store, StoreActor.fence, process.worker)  # what it could not give back goes on elsewhere
        self.loops.remove(loop)
        loop.running = loop.retired_at = None
        self.telemetry.event("actor_ended", f"{loop.name} has ended, as was asked", actor=loop.name)

    def _replace_ended(self, loop: Loop) -> None:
        try:
            ray.get([loop.process.run_ref], timeout=TICK_S)
        except RayActorError as error:
            failure = failure_of(error)
            if failure is not None and not loop.has_answered:  # nor would the next one be made
                raise PmdflowError(f"{loop.name} cannot start: {failure}") from error
            self._replace(loop, failure or "its process died")
        except RayTaskError as error:
            if not isinstance(error.cause, EngineDied):
                raise PmdflowError(f"{loop.name} failed: {error.cause}") from error
            self._replace(loop, str(error.cause))
        else:
            self._replace(loop, "its loop ended by itself")

    def _replace(self, loop: Loop, why: str) -> None:
        process = loop.process
        if not process.answered:
            loop.quick_deaths.append(why)
        if len(loop.quick_deaths) >= MAX_QUICK_DEATHS:
            raise PmdflowError(
                f"{loop.name} died {len(loop.quick_deaths)} times before it was ready; at first: "
                f"{loop.quick_deaths[0]}",
                hint=f"see logs/{loop.name}.log in the run directory",
            )
        self.telemetry.event("actor_died", f"{loop.name}: {why}; starting another", actor=loop.name)
        ray.kill(process.actor)
        if loop.takes_weights:
            # Its trajectories go on elsewhere, now and not when its leases expire.
            call(self.store, StoreActor.fence, process.worker)
        self.start_loop(loop)
        version = 0 if self.handle is None else self.handle.version
        self.telemetry.event("actor_restarted", f"{loop.name} starts again from version {version}", actor=loop.name)

    def _drain_learner(self, rank: int, learner: ActorHandle[LearnerActor]) -> None:
        ref = self._learner_drains.get(rank)
        if ref is not None:
            if not is_ready(ref):
                return
            try:
                report = _answer(ref, what=f"learner rank {rank}")
            except ActorDied as error:
                raise LearnerDied(str(error)) from error
            self.telemetry.take(report, source=f"learner-{rank}")
        self._learner_drains[rank] = call(learner, LearnerActor.drain)

    def _watch_store(self) -> None:
        """Take the store's report and numbers, as asked for one tick ago."""
        if self._store_drain is not None and is_ready(self._store_drain):
            self.telemetry.take(_answer(self._store_drain, what="the store actor"), source="store")
            self._store_drain = None
        if self._store_drain is None:
            self._store_drain = call(self.store, StoreActor.drain)
        if self._sample is not None and is_ready(self._sample):
            self.telemetry.sample(*_answer(self._sample, what="the store's counts"))
            self._sample = None
        if self._sample is None:
            self._sample = call(self.store, StoreActor.sample)


def _answer(ref: ObjectRef[Answer], *, what: str) -> Answer:
    return answers([ref], what=what, timeout_s=STARTUP_TIMEOUT_S)[0]
