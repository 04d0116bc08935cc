"""Typed calls of Ray actors, of the store actor above all: the one seam between a run's parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Event
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from pmdflow.errors import ActorDied, PmdflowError, WaitTimeout
from pmdflow.store.actor import StoreActor
from pmdflow.store.creation import failure_of

SILENCE_TIMEOUT_S = 120.0
"""A call unanswered for this long ends the actor that made it: it outlasts a restart of the store actor."""
STOP_LOOK_S = 1.0
"""How often whoever waits for an answer looks whether it shall stop."""

Actor = TypeVar("Actor")
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

StoreHandle: TypeAlias = ActorHandle[StoreActor]


def call(
    actor: ActorHandle[Actor],
    method: Callable[Concatenate[Actor, Arguments], Answer],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> ObjectRef[Answer]:
    """Call `method` of an actor; the reference is the answer to come, with the type that the method declares.

    Example:
        >>> counts: ObjectRef[Counts] = call(store, StoreActor.counts)  # doctest: +SKIP
    """
    answer: ObjectRef[Answer] = getattr(actor, method.__name__).remote(*args, **kwargs)
    return answer


def answers(refs: Sequence[ObjectRef[Answer]], *, what: str, timeout_s: float) -> list[Answer]:
    """The answers of several calls, in order.

    Raises:
        ActorDied: who should answer is dead.
        WaitTimeout: they are not all there in time; names `what`.
        PmdflowError: a call failed.
    """
    try:
        return ray.get(list(refs), timeout=timeout_s)
    except GetTimeoutError as error:
        raise WaitTimeout(f"{what} was not done within {timeout_s:g} s") from error
    except ObjectLostError as error:
        raise ActorDied(f"the node of an actor was lost while {what} was awaited: {error}") from error
    except RayActorError as error:
        raise ActorDied(f"an actor died while {what} was awaited: {failure_of(error) or error}") from error
    except RayTaskError as error:
        raise PmdflowError(f"{what} failed: {error.cause}") from error


def answer_unless(stopping: Event, ref: ObjectRef[Answer], *, whose: str) -> Answer | None:
    """The answer of the store actor to the loop of `whose` actor; None if `stopping` came first.

    Raises:
        WaitTimeout: the store actor is silent for longer than a restart takes it.
    """
    deadline = time.monotonic() + SILENCE_TIMEOUT_S
    while not ray.wait([ref], timeout=STOP_LOOK_S)[0]:
        if stopping.is_set():
            return None
        if time.monotonic() > deadline:
            raise WaitTimeout(f"the store actor did not answer the {whose} actor within {SILENCE_TIMEOUT_S:g} s")
    return ray.get(ref, timeout=SILENCE_TIMEOUT_S)
