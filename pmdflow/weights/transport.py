"""How a published policy version travels from the learner to the rollout actors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import ray

if TYPE_CHECKING:
    from pmdflow.weights.file import NamedTensors, WeightsFile
    from pmdflow.weights.probe import Probe

Bytes: TypeAlias = npt.NDArray[np.uint8]
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsHandle:
    """Where the whole weights of one policy version can be fetched; made only after they are complete."""

    version: int
    location: Any
    """What the transport that made it needs."""
    digest: str = ""
    """That of the file's bytes, which whoever fetches it must find."""
    probe: Probe | None = None
    """What an engine that serves the version gives; None: nobody asks."""
    peers: tuple[Any, ...] = ()
    """Actors that have fetched it since, which have a `read_weights` like the one that published it."""


class Transport(Protocol):
    """Publisher and subscriber side of one way to move weights. On a node, all processes map one file of a version."""

    def publish(self, version: int, weights: NamedTensors) -> WeightsHandle:
        """Make `version` fetchable. Called by learner rank 0, to which each tensor comes when its turn does."""

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> WeightsFile:
        """Get the weights of a handle: the node's file of them, or bytes from whoever has them.

        Raises:
            WaitTimeout: they did not arrive in time.
            WeightsLost: nobody has them any more.
            PmdflowError: what arrived is not what was published.
        """

    def read(self, version: int, offset: int, num_bytes: int) -> Bytes:
        """Bytes of the file of a version that this process has published or fetched.

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
