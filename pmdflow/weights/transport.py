"""How a published policy version travels from the learner to the rollout actors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Weights: TypeAlias = "Mapping[str, Tensor]"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsHandle:
    """Where the whole weights of one policy version can be fetched; made only after they are complete."""

    version: int
    location: Any
    """What the transport that made it needs: an object reference or a path."""


class Transport(Protocol):
    """Publisher and subscriber side of one way to move weights."""

    def publish(self, version: int, weights: Weights) -> WeightsHandle:
        """Make `version` fetchable. Called by learner rank 0 with the full state dict on the CPU."""

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> Weights:
        """Get the weights of a handle.

        Raises:
            WaitTimeout: they did not arrive in time.
            WeightsLost: nobody has them any more.
        """
