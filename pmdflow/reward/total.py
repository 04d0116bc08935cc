"""The reward that a trajectory is trained with: what its functions gave, and what depends on its end and its group.

It is computed at the claim from what the store holds, so a replay can compute it anew with other settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pmdflow.reward.length import length_reward
from pmdflow.types import Claim, Float64, Mask, Stop, TrainBatch

if TYPE_CHECKING:
    from pmdflow.config.schema import RewardConfig

CORRECT_REWARD = 0.5
"""A trajectory is correct from this reward on: it separates 0 and 1 as well as -1 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalRewards:
    """Rewards of a claim, each [N]."""

    task: Float64
    """With the penalties for how a trajectory ended, without the length reward; the group filter reads these."""
    total: Float64
    """What advantages are made of."""
    correct: npt.NDArray[np.bool_]
    """From `CORRECT_REWARD` on, and not cut at `data.max_tokens` where that has a reward of its own."""
    mean: float
    """Of `total` over episodes."""
    length_weight: float
    """Weight of the length reward in `total`; 0 during its warm-up."""

    def metrics(self) -> dict[str, float]:
        """Mean of `total` over episodes, and the weight that the length reward had."""
        return {"reward/total_mean": self.mean, "reward/length_weight": self.length_weight}


def total_rewards(batch: TrainBatch | Claim, reward: RewardConfig) -> TotalRewards:
    """Apply the rewards that need the end of a trajectory or its whole group.

    - A trajectory cut at `data.max_tokens` gets `cut_reward`, if that is set, and counts as wrong.
    - One that the repetition detector ended loses `repetition_penalty`.
    - The length reward is added with its weight after `length_warmup_iterations`.

    Source: arXiv:2501.12599 sec. 2.3.3 and fig. 3b; arXiv:2507.20534 sec. 3.2.
    """
    first = batch.first_branches()
    cut = (batch.stops == Stop.LENGTH) & (reward.cut_reward is not None)
    task = np.where(cut, reward.cut_reward or 0.0, batch.rewards)
    task = task - reward.repetition_penalty * (batch.stops == Stop.REPETITION)
    weight = reward.length_weight if batch.iteration > reward.length_warmup_iterations else 0.0
    total, correct = task, (batch.rewards >= CORRECT_REWARD) & ~cut
    if weight > 0:
        episode = batch.episode_of()
        lengths = np.bincount(episode, weights=batch.count(Mask.GENERATED)).astype(np.int64)
        total = task + weight * length_reward(lengths, correct[first], batch.groups[first])[episode]
    mean = float(total[first].mean()) if len(first) else 0.0
    return TotalRewards(task=task, total=total, correct=correct, mean=mean, length_weight=weight)
