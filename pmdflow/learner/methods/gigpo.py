"""GiGPO: groups inside groups, turns compared with other turns that began in the same state."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pmdflow.learner.advantage import grpo
from pmdflow.types import Float64, Int64


def gigpo(
    returns: npt.ArrayLike,
    groups: npt.ArrayLike,
    turn_trajectory: npt.ArrayLike,
    turn_keys: npt.ArrayLike,
    turn_rewards: npt.ArrayLike,
    *,
    gamma: float,
    weight: float = 1.0,
    scale_by_std: bool = False,
    eps: float = 1e-6,
) -> Float64:
    """Credit of each turn: its episode's, plus `weight` times its return against those from the same state.

    The state is the key of what the turn was an answer to, within one prompt's group; a state that was seen once gives
    0, one that a trajectory comes back to counts as often as it did.

    Args:
        returns: Of each episode [n].
        groups: Group label of each episode [n].
        turn_trajectory: Index of each turn's episode [m]; the turns of an episode are in their order.
        turn_keys: State that each turn began in, numbers or texts [m].
        turn_rewards: Reward of each turn [m].
        gamma: Discount of later turns' rewards.
        weight: Of the part by state; 0 is GRPO.
        scale_by_std: Divide both parts by the standard deviation (n - 1 in its denominator) of what is compared.
        eps: Added to it.

    Returns:
        float64 [m].

    Raises:
        ValueError: a shape is wrong, a value is not finite, or a turn's episode is not there.

    Source: arXiv:2505.10978 eq. 5 to 9.
    """
    episode = grpo(returns, groups, eps=eps, scale_by_std=scale_by_std)
    owner = np.asarray(turn_trajectory, np.int64)
    keys: npt.NDArray[Any] = np.asarray(turn_keys)
    rewards = np.asarray(turn_rewards, np.float64)
    if owner.ndim != 1 or keys.shape != owner.shape or rewards.shape != owner.shape:
        raise ValueError(
            f"turn_trajectory {owner.shape}, turn_keys {keys.shape} and turn_rewards {rewards.shape} must be "
            "one-dimensional and of equal length: pass one value of each for each turn"
        )
    if owner.size and not (owner.min() >= 0 and owner.max() < len(episode)):
        raise ValueError(f"a turn is of episode {owner.max()} or {owner.min()}, but there are {len(episode)}")
    if not np.isfinite(rewards).all():
        raise ValueError("a turn's reward is not finite")
    group_of = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)[owner] if owner.size else owner
    key_of = np.unique(keys, return_inverse=True)[1].reshape(-1)
    state = group_of * (key_of.max(initial=0) + 1) + key_of
    found = discounted(rewards, owner, gamma=gamma)
    # A state seen once is compared with nothing, where a group of one keeps its reward.
    counts = np.unique(state, return_inverse=True, return_counts=True)
    repeated = counts[2][counts[1].reshape(-1)] > 1 if state.size else np.zeros(0, np.bool_)
    steps = grpo(found, state, eps=eps, scale_by_std=scale_by_std)
    return np.asarray(episode[owner] + weight * np.where(repeated, steps, 0.0))


def discounted(rewards: Float64, owner: Int64, *, gamma: float) -> Float64:
    """The return of each turn: its reward and gamma times that of the next turn of the same episode [m]."""
    later: dict[int, float] = {}
    found = np.zeros(len(rewards))
    for turn in range(len(rewards) - 1, -1, -1):
        found[turn] = later[int(owner[turn])] = rewards[turn] + gamma * later.get(int(owner[turn]), 0.0)
    return found
