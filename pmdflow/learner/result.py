"""What an iteration of the learner answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pmdflow.types import Float64


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What one iteration did; equal on all ranks."""

    metrics: dict[str, Any]
    """The `learner/*` and `reward/*` metrics that repeat bit for bit."""
    speed: dict[str, Any]
    """Those that depend on the clock."""
    left_out: dict[str, list[int]]
    """Ids of the trajectories that the learner itself left out of the claim, by reason: `filter` or `veto`."""
    advantages: Float64
    """One value a trajectory [N], as the algorithm gave it to the loss: its mean over the tokens where it is one a
    token, 0 for groups that the filter left out."""
