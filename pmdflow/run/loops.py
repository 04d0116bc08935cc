"""The replaceable actors of a run, as the controller's side knows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import ray
from ray import ObjectRef
from ray._private.state import actors
from ray.actor import ActorHandle

from pmdflow.metrics.report import ActorReport
from pmdflow.weights.transport import WeightsHandle

LoopHandle: TypeAlias = ActorHandle[Any]
"""Of an actor that is a `LoopActor`."""


class LoopActor(Protocol):
    """What rollout and reward actors have in common, beside a `run` that goes on until `stop`."""

    def drain(self) -> ActorReport:
        """What happened since the last call."""

    def stop(self) -> None:
        """Let `run` return."""


@dataclass(slots=True, kw_only=True)
class Running:
    """One process of a replaceable actor."""

    actor: LoopHandle
    worker: str
    """The name under which it takes leases; no other process has it."""
    run_ref: ObjectRef[object]
    drain_ref: ObjectRef[ActorReport] | None = None
    asked_at: float = 0.0
    """Monotonic second of the question that `drain_ref` answers."""
    last_reports: int = 2
    """To be taken once it has ended: the one that was asked for before, then the one of what came since."""
    placed: bool = False
    """Whether Ray has found a node for it; until then it is neither slow nor dead."""
    missed: bool = False
    """Whether somebody was told that it has no place."""
    answered: bool = False
    serves: int = 0
    """Version whose weights it was given or offered last."""
    evaluates: int | None = None
    """Version that it keeps, and answers held-out prompts by."""
    offer: ObjectRef[bool] | None = None
    """Whether it uses these, not yet looked at."""
    uses: int = -1
    """Newest version that it was offered and has used."""
    refused: int = 0
    """Offers in a row that it could not take."""
    behind_since: float | None = None
    """Monotonic second of the oldest offer since it last used one; None: it uses the newest."""

    @property
    def ended(self) -> bool:
        """Whether its `run` has returned or failed."""
        return is_ready(self.run_ref)


@dataclass(slots=True, kw_only=True)
class Loop:
    """A replaceable actor with a `run` loop: a rollout actor or a reward actor."""

    name: str
    start: Callable[[WeightsHandle | None, str], tuple[LoopHandle, ObjectRef[object]]]
    """Makes the actor and calls its `run`, given the newest weights and the name of the worker."""
    takes_weights: bool
    hang_timeout_s: float
    """An actor that answered before and is silent for this long is killed and replaced."""
    needs: str = "nothing"
    """What a process of it reserves, for messages."""
    starts: int = 0
    """Processes started for it so far."""
    quick_deaths: list[str] = field(default_factory=list)
    """Why processes in a row died that had not answered once."""
    has_answered: bool = False
    """Whether any process of it has: what it needs can be had."""
    running: Running | None = None
    retired_at: float | None = None
    """Monotonic second at which it was told to end for good."""

    @property
    def process(self) -> Running:
        """The present one."""
        assert self.running is not None, "start_loop comes first"
        return self.running


def is_placed(actor: ActorHandle[Any]) -> bool:
    """Whether Ray has found a node for an actor: of one that waits for room, or is just made, it knows no address."""
    known = actors(actor._actor_id.hex())
    return bool(known) and bool(known["Address"]["IPAddress"])


def is_ready(ref: ObjectRef[Any]) -> bool:
    """Whether an answer is there."""
    return bool(ray.wait([ref], num_returns=1, timeout=0)[0])
