"""The length reward of Kimi k1.5, the first of the group rewards."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pmdflow.reward.group import GroupView, History
from pmdflow.types import Float64

LENGTH = "length"
"""Name of the length reward among group rewards."""


def length_reward(lengths: npt.ArrayLike, correct: npt.ArrayLike, groups: npt.ArrayLike) -> Float64:
    """Favor short correct answers within a group, and never reward wrong ones for being short.

    lambda = 0.5 - (length - min) / (max - min) with min and max over all samples of the group; correct samples get
    lambda, wrong ones min(0, lambda); everyone gets 0 when all lengths are equal.

    Args:
        lengths: Generated tokens of each trajectory [n].
        correct: Whether each trajectory is correct [n].
        groups: Group label of each trajectory [n]; members need not be adjacent.

    Returns:
        float64 [n], between -0.5 and 0.5.

    Raises:
        ValueError: the shapes differ.

    Source: arXiv:2501.12599 sec. 2.3.3.
    """
    values = np.asarray(lengths, dtype=np.float64)
    right = np.asarray(correct, dtype=np.bool_)
    labels = np.asarray(groups)
    if values.ndim != 1 or right.shape != values.shape or labels.shape != values.shape:
        raise ValueError(
            f"lengths {values.shape}, correct {right.shape} and groups {labels.shape} must be one-dimensional and of "
            "equal length: pass one value of each for each trajectory"
        )
    unique, inverse = np.unique(labels, return_inverse=True)
    numbers = inverse.reshape(-1)
    shortest = np.full(len(unique), np.inf)
    longest = np.full(len(unique), -np.inf)
    np.minimum.at(shortest, numbers, values)
    np.maximum.at(longest, numbers, values)
    span = (longest - shortest)[numbers]
    factor = 0.5 - (values - shortest[numbers]) / np.where(span > 0, span, 1.0)
    reward = np.where(right, factor, np.minimum(0.0, factor))
    return np.where(span > 0, reward, 0.0)


def length_of_group(view: GroupView, history: History) -> dict[str, Float64]:
    """`length_reward` as a group reward."""
    return {"value": length_reward(view.lengths, view.correct, np.zeros(len(view.lengths)))}
