"""How a published policy version travels from the learner to the rollout actors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import ray

from pmdflow.types import UInt8

if TYPE_CHECKING:
    from pmdflow.weights.file import NamedTensors, WeightsFile
    from pmdflow.weights.probe import Probe
    from pmdflow.weights.shares import Ranks

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a version's delta has to be added to."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsHandle:
    """Where the whole weights of one policy version can be fetched; made only after they are complete."""

    version: int
    location: Any
    """What the transport that made it needs."""
    digest: str = ""
    """That of the file's bytes, which whoever fetches it must find; empty for a version out of a checkpoint."""
    probe: Probe | None = None
    """What an engine that serves the version gives; None: nobody asks."""
    base: Base | None = None
    """The version before it, if what changed since is given out too; None: only the whole file is."""
    peers: tuple[Any, ...] = ()
    """Actors that have fetched it since, which have a `read_weights` like the one that published it."""


class Stored(Protocol):
    """Where versions are that were published, beside those who have them in memory."""

    def tensors(self, version: int) -> NamedTensors | None:
        """What was published as `version`; None if it is not there. Going through it raises WeightsLost if it goes."""


class Transport(Protocol):
    """Publisher and subscriber side of one way to move weights. On a node, all processes map one file of a version."""

    def publish(self, version: int, weights: NamedTensors, ranks: Ranks) -> WeightsHandle:
        """Make `version` fetchable. Every learner rank calls and goes through all tensors; if one fails, all do."""

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> WeightsFile:
        """Get the weights of a handle: the node's file of them, bytes from whoever has them, or a checkpoint's.

        Raises:
            WaitTimeout: they did not arrive in time.
            WeightsLost: nobody has them any more.
            WeightsDamaged: what arrived is not what was published.
        """

    @property
    def received(self) -> Mapping[str, int]:
        """Since it was made: `fetched_bytes` that came from elsewhere, `fetched_deltas`: versions made of deltas."""

    def read(self, version: int, offset: int, num_bytes: int, *, delta: bool = False) -> UInt8:
        """UInt8 of the file of a version that this process has published or fetched, or of its delta.

        Raises:
            WeightsLost: it does not have it any more.
        """


def in_group(name: str) -> Callable[[Method], Method]:
    """Give a method of an actor threads of its own, of which `THREADS` is told; its type stays."""

    def decorate(method: Method) -> Method:
        ray.method(concurrency_group=name)(method)  # marks the method itself
        return method

    return decorate


THREADS = {"weights": 2}
"""Concurrency group of an actor that gives out weights: it serves so many nodes at a time beside all else."""
