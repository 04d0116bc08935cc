"""GiGPO: groups inside groups, turns compared with other turns that began in the same state."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.advantage import grpo
from pmdflow.learner.algorithm import Algorithm
from pmdflow.learner.losses import pmd_tokens
from pmdflow.learner.view import ClaimView, Credit, State
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

    `returns` and `groups` are those of episodes [n], the others those of turns [m]: the index of each one's episode, in
    whose order they are, the state that it began in (numbers or texts), and its reward. `gamma` discounts later turns'
    rewards; a `weight` of 0 is GRPO; `scale_by_std` divides both parts by the deviation of what is compared plus `eps`.

    Returns:
        float64 [m].

    Raises:
        ValueError: a shape is wrong, a value is not finite, or a turn's episode is not there.

    Source: arXiv:2505.10978 eq. 5 to 9.
    """
    episode = grpo(returns, groups, eps=eps, scale_by_std=scale_by_std)
    owner, keys, rewards = _turns(turn_trajectory, turn_keys, turn_rewards, episodes=len(episode))
    label = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    state = label[owner] * (len(keys) + 1) + np.unique(keys, return_inverse=True)[1].reshape(-1)
    _, place, counts = np.unique(state, return_inverse=True, return_counts=True)
    steps = grpo(discounted(rewards, owner, gamma=gamma), state, eps=eps, scale_by_std=scale_by_std)
    # A state seen once is compared with nothing, where a group of one would keep its reward.
    return np.asarray(episode[owner] + weight * np.where(counts[place.reshape(-1)] > 1, steps, 0.0))


def _turns(
    trajectory: npt.ArrayLike, given: npt.ArrayLike, reward: npt.ArrayLike, *, episodes: int
) -> tuple[Int64, npt.NDArray[Any], Float64]:
    owner = np.asarray(trajectory, np.int64)
    keys: npt.NDArray[Any] = np.asarray(given)
    rewards = np.asarray(reward, np.float64)
    if owner.ndim != 1 or keys.shape != owner.shape or rewards.shape != owner.shape:
        raise ValueError(
            f"turn_trajectory {owner.shape}, turn_keys {keys.shape} and turn_rewards {rewards.shape} must be "
            "one-dimensional and of equal length: pass one value of each for each turn"
        )
    if owner.size and not (owner.min() >= 0 and owner.max() < episodes):
        raise ValueError(f"a turn is of episode {owner.max()} or {owner.min()}, but there are {episodes}")
    if not np.isfinite(rewards).all():
        raise ValueError("a turn's reward is not finite")
    return owner, keys, rewards


def discounted(rewards: Float64, owner: Int64, *, gamma: float) -> Float64:
    """The return of each turn: its reward and gamma times that of the next turn of the same episode [m]."""
    later: dict[int, float] = {}
    found = np.zeros(len(rewards))
    for turn in range(len(rewards) - 1, -1, -1):
        found[turn] = later[int(owner[turn])] = rewards[turn] + gamma * later.get(int(owner[turn]), 0.0)
    return found


def _credit(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    """An episode whose turns were rewarded has these rewards; any other's is that of its last turn."""
    episodes, turns = view.episodes, view.turns
    begins = np.ones(len(turns), np.bool_)
    begins[1:] = (np.diff(episodes) != 0) | (np.diff(turns) != 0)
    first = np.flatnonzero(begins)
    owner, keys = episodes[first], view.turn_keys[first]
    last = np.append(np.diff(owner) != 0, True)[: len(owner)]
    gamma, weight = float(learner.settings["gamma"]), float(learner.settings["weight"])
    said = view.turn_rewards[first]
    rewarded = np.bincount(owner, weights=said != 0, minlength=view.num_episodes)[owner] > 0
    rewards = np.where(rewarded, said, np.where(last, view.rewards[owner], 0.0))
    values = gigpo(view.rewards, view.groups, owner, keys, rewards, gamma=gamma, weight=weight)
    states = np.column_stack([view.groups[owner], keys])
    counts = np.unique(states, axis=0, return_inverse=True, return_counts=True)
    shared = float((counts[2][counts[1].reshape(-1)] > 1).mean()) if len(first) else 0.0
    return Credit(values=values[np.cumsum(begins) - 1], per="token", metrics={"shared_states_share": shared})


GIGPO = Algorithm(
    credit=_credit,
    loss=pmd_tokens,
    needs=frozenset({"turns", "turn_keys", "turn_rewards"}),
    settings={"gamma": 0.95, "weight": 1.0},
)
"""The state of a turn is the environment's key, else what it said before it; `gamma` is our choice."""
