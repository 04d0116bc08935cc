"""Typed calls of Ray actors, of the store actor above all: the one seam between a run's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from pmdflow.errors import ActorDied, PmdflowError, WaitTimeout
from pmdflow.store.actor import StoreActor
from pmdflow.store.creation import failure_of

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
