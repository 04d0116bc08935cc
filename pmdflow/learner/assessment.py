"""What an algorithm makes of a claim, before anything is trained on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmdflow.learner.view import State
from pmdflow.types import Float32, Float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """One claim under one setting, at the weights of then."""

    advantages: Float64
    """One value a trajectory [N], as in `TrainResult`."""
    weights: Float64
    """Of the loss of each trajectory that is trained, importance weights included."""
    loss: float
    """Of the whole claim as one step."""
    gradient: Float32
    """Of that loss, all parameters one after another."""
    state: State | None
    """What the algorithm would begin the next claim with."""

    @property
    def ess_share(self) -> float:
        """Effective sample size of the weights over their number; 0 where nothing is trained."""
        squares = float((self.weights**2).sum())
        return float(self.weights.sum()) ** 2 / (len(self.weights) * squares) if squares else 0.0


def flat(parts: list[npt.NDArray[np.float32]]) -> Float32:
    """Arrays of any shapes, one after another."""
    return np.concatenate([np.zeros(0, np.float32), *(part.reshape(-1) for part in parts)])
