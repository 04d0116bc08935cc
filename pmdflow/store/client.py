"""Typed calls of Ray actors, of the store actor above all: the one seam between a run's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

from ray import ObjectRef
from ray.actor import ActorHandle

from pmdflow.store.actor import StoreActor

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
