"""Supervision: every wait of the controller watches all actors, replaces the dead and collects their telemetry."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pmdflow.errors import ActorDied, EngineDied, LearnerDied, PmdflowError, WaitTimeout
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.store.answers import LateMembers
from pmdflow.types import Counts
from pmdflow.weights.transport import WeightsHandle

TICK_S = 1.0
STARTUP_TIMEOUT_S = 300.0
"""An actor that has not answered once by then has failed to start."""
MAX_QUICK_DEATHS = 5
"""A loop that dies this often without having answered once is given up."""


@dataclass(slots=True)
class Loop:
    """A replaceable actor with a `run` loop: a rollout actor or the reward actor."""

    name: str
    make: Callable[[], Any]
    takes_weights: bool
    hang_timeout_s: float
    """An actor that answered before and is silent for this long is killed and replaced."""
    actor: Any = None
    run_ref: Any = None
    starts: int = 0
    """Actors made for it so far."""
    drain_ref: Any = None
    drain_since: float = 0.0
    answered: bool = False
    quick_deaths: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """Generated, drafted and accepted ones of the present actor, as last drained."""

    @property
    def worker(self) -> str:
        """The name under which the present actor takes leases; no other actor has it."""
        return f"{self.name}/{self.starts}"


class Supervisor:
    """Owns the actors of a run. The controller waits only through `wait`."""

    def __init__(self, *, store: Any, recorder: Recorder, live: LiveView) -> None:
        """Supervise nothing yet; `store` is the handle of the store actor, which Ray itself restarts."""
        self.store = store
        self.recorder = recorder
        self.live = live
        self.learners: list[Any] = []
        self.loops: list[Loop] = []
        self.draining = False
        self.handle: WeightsHandle | None = None
        """Newest published weights; None until the first publication: those of the model folder."""
        self._learner_drains: dict[int, Any] = {}
        self._store_drain: Any = None
        self._sample_ref: Any = None
        self._last_tick = 0.0
        self._applied: list[Any] = []
        self._generated_before = (time.time(), 0)
        self.tokens: Counter[str] = Counter()
        """`generated_tokens`, `drafted_tokens` and `accepted_tokens` of all rollout actors, lost ones included."""
        self.busy_s = 0.0
        """Seconds that rollout actors spent outside wait spans, as drained so far."""
        self.waited_s = 0.0
        """Seconds in their wait spans."""

    def start_loop(self, loop: Loop) -> None:
        """Create the actor of a loop and run it from the newest weights."""
        loop.actor = loop.make()
        loop.starts += 1
        arguments = (self.handle, loop.worker) if loop.takes_weights else ()
        loop.run_ref = loop.actor.run.remote(*arguments)
        loop.drain_ref, loop.drain_since, loop.answered, loop.tokens = None, time.monotonic(), False, {}
        if loop not in self.loops:
            self.loops.append(loop)

    def wait(self, refs: Sequence[Any], *, what: str, timeout_s: float) -> list[Any]:
        """Results of all `refs`, in order, while the actors are watched.

        Raises:
            ActorDied: an actor that answers one of them, or a learner rank, has died.
            WaitTimeout: they were not all there in time; names `what`.
        """
        deadline = time.monotonic() + timeout_s
        pending = list(refs)
        while pending:
            ray.wait([*pending, *(loop.run_ref for loop in self.loops)], num_returns=1, timeout=TICK_S)
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=0)
            self._get(done, what=what)
            self.tick()
            if pending and time.monotonic() > deadline:
                raise WaitTimeout(f"{what} was not done within {timeout_s:g} s")
        return self._get(refs, what=what)

    def call(self, method: Any, *args: Any, what: str, timeout_s: float = 120.0) -> Any:
        """One remote call, waited for."""
        return self.wait([method.remote(*args)], what=what, timeout_s=timeout_s)[0]

    def tick(self) -> None:
        """Replace actors that ended; once in `TICK_S`, look after every actor and collect telemetry. Never waits."""
        for loop in self.loops:
            if _is_ready(loop.run_ref):
                self._replace_ended(loop)
        if time.monotonic() - self._last_tick < TICK_S:
            return
        self._last_tick = time.monotonic()
        for loop in self.loops:
            self._watch(loop)
        for rank, learner in enumerate(self.learners):
            self._drain_learner(rank, learner)
        if self._store_drain is not None and _is_ready(self._store_drain):
            spans, late = self._get([self._store_drain], what="the store actor")[0]
            self.recorder.spans(spans)
            for group in late:
                self._record_late(group)
            self._store_drain = None
        if self._store_drain is None:
            self._store_drain = self.store.drain.remote()
        self._sample()

    def offer_weights(self, handle: WeightsHandle, *, timeout_s: float) -> None:
        """Send a published version to every rollout actor."""
        self.handle = handle
        self._applied = [
            loop.actor.update_weights.remote(handle, timeout_s) for loop in self.loops if loop.takes_weights
        ]

    def await_applied(self, *, timeout_s: float) -> None:
        """Wait until every living rollout actor uses the newest version, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._applied and time.monotonic() < deadline:
            _, self._applied = ray.wait(self._applied, num_returns=1, timeout=TICK_S)
            self.tick()

    def stop_loops(self, *, timeout_s: float) -> None:
        """Let every loop finish what it holds; one that does not is killed, which loses only unsent tokens."""
        for loop in self.loops:
            loop.actor.stop.remote()
        ray.wait([loop.run_ref for loop in self.loops], num_returns=len(self.loops), timeout=timeout_s)
        self._last_tick = 0.0
        for loop in self.loops:
            self._collect(loop)
            ray.kill(loop.actor)
        self.loops.clear()

    def stop_learners(self) -> None:
        """Kill every learner rank; their state is the newest checkpoint."""
        for learner in self.learners:
            ray.kill(learner)
        self.learners.clear()
        self._learner_drains.clear()

    def event(self, kind: str, message: str, **attrs: Any) -> None:
        """Record an event and show it."""
        self.recorder.event(kind, message, **attrs)
        self.live.event(kind, message)

    def _record_late(self, late: LateMembers) -> None:
        message = (
            f"group {late.group} ({late.prompt_id}) does not wait for its late members: {late.members} evicted "
            f"with {late.tokens} tokens"
        )
        self.event("late_members", message, group=late.group, members=late.members, tokens=late.tokens)

    def _get(self, refs: Sequence[Any], *, what: str) -> list[Any]:
        try:
            return list(ray.get(list(refs), timeout=STARTUP_TIMEOUT_S))
        except RayActorError as error:
            raise ActorDied(f"an actor died while {what} was awaited: {error}") from error
        except RayTaskError as error:
            raise PmdflowError(f"{what} failed: {error.cause}") from error

    def _watch(self, loop: Loop) -> None:
        if self._collect(loop):
            return
        silent_s = time.monotonic() - loop.drain_since
        if silent_s > (loop.hang_timeout_s if loop.answered else STARTUP_TIMEOUT_S):
            self._replace(loop, f"it did not answer for {silent_s:.0f} s")

    def _collect(self, loop: Loop) -> bool:
        """Take the answer to the last `drain`, if it is there, and ask for the next one."""
        if loop.drain_ref is not None and not _is_ready(loop.drain_ref):
            return False
        if loop.drain_ref is not None:
            try:
                self._take(loop, ray.get(loop.drain_ref, timeout=TICK_S))
            except RayActorError:
                return False
            loop.answered, loop.quick_deaths = True, 0
        loop.drain_ref, loop.drain_since = loop.actor.drain.remote(), time.monotonic()
        return True

    def _take(self, loop: Loop, answer: Any) -> None:
        if not loop.takes_weights:
            self.recorder.spans(answer)
            return
        self.recorder.spans(answer["spans"])
        for problem in answer["problems"]:
            self.event("environment_failed", problem, actor=loop.name)
        for span in answer["spans"]:
            seconds = span["end"] - span["start"]
            if span["name"].startswith("wait_"):
                self.waited_s += seconds
            else:
                self.busy_s += seconds
        tokens = {name: count for name, count in answer.items() if name.endswith("_tokens")}
        for name, count in tokens.items():
            self.tokens[name] += count - loop.tokens.get(name, 0)
        loop.tokens = tokens

    def _replace_ended(self, loop: Loop) -> None:
        try:
            ray.get(loop.run_ref, timeout=TICK_S)
        except RayActorError:
            self._replace(loop, "its process died")
        except RayTaskError as error:
            if not isinstance(error.cause, EngineDied):
                raise PmdflowError(f"{loop.name} failed: {error.cause}") from error
            self._replace(loop, str(error.cause))
        else:
            self._replace(loop, "its loop ended by itself")

    def _replace(self, loop: Loop, why: str) -> None:
        loop.quick_deaths += 0 if loop.answered else 1
        if loop.quick_deaths >= MAX_QUICK_DEATHS:
            raise ActorDied(f"{loop.name} died {loop.quick_deaths} times before it was ready ({why}); see its log")
        self.event("actor_died", f"{loop.name}: {why}; starting another", actor=loop.name)
        ray.kill(loop.actor)
        if loop.takes_weights:
            self.store.fence.remote(loop.worker)  # its trajectories go on elsewhere, now and not when its leases expire
        self.start_loop(loop)
        self.event("actor_restarted", f"{loop.name} starts again from version {self._version()}", actor=loop.name)

    def _version(self) -> int:
        return 0 if self.handle is None else self.handle.version

    def _drain_learner(self, rank: int, learner: Any) -> None:
        ref = self._learner_drains.get(rank)
        if ref is not None and not _is_ready(ref):
            return
        if ref is not None:
            try:
                self.recorder.spans(self._get([ref], what=f"learner rank {rank}")[0])
            except ActorDied as error:
                raise LearnerDied(str(error)) from error
        self._learner_drains[rank] = learner.drain.remote()

    def _sample(self) -> None:
        """Record the store's counts and ledger, as asked for one tick ago."""
        if self._sample_ref is not None and _is_ready(self._sample_ref):
            counts, ledger = self._get([self._sample_ref], what="the store's counts")[0]
            values = {**store_values(counts, ledger), "rollout/tokens_per_s": self._tokens_per_s()}
            self.recorder.metric("sample", values)
            self.live.update(values)
            self._sample_ref = None
        if self._sample_ref is None:
            self._sample_ref = self.store.sample.remote()

    def _tokens_per_s(self) -> float:
        (before, generated), now = self._generated_before, time.time()
        self._generated_before = (now, self.tokens["generated_tokens"])
        return (self.tokens["generated_tokens"] - generated) / max(now - before, 1e-9)


def store_values(counts: Counts, ledger: dict[str, int]) -> dict[str, Any]:
    """Counts and ledger by metric key."""
    names = (
        "groups_ready", "groups_untrained", "groups_claimed", "trajectories_leased", "trajectories_idle",
        "trajectories_partial", "trajectories_unscored", "trajectories_late", "bytes",
    )  # fmt: skip
    return {
        **{f"store/{name}": getattr(counts, name) for name in names},
        "scheduler/version": counts.version,
        "scheduler/tokens_budget": counts.tokens_budget,
        "scheduler/tokens_spent": counts.tokens_spent,
        **{f"ledger/{name}": value for name, value in ledger.items()},
    }


def _is_ready(ref: Any) -> bool:
    return bool(ray.wait([ref], num_returns=1, timeout=0)[0])
