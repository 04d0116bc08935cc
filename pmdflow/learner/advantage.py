"""Group advantages: what each trajectory's reward is compared with. NumPy, float64, pure functions.

Members of a group need not be adjacent. Rewards are shifted inside a group before they are summed, so equal
rewards give exactly 0.

Source: arXiv:2501.12599 sec. 2.3 (mean, partition), arXiv:2602.05933 and OpenKimi PMD (leave-one-out, floor),
arXiv:2605.02469 (Boltzmann weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmdflow.types import Float64

Singleton = Literal["reward", "zero"]


def _checked(rewards: npt.ArrayLike, groups: npt.ArrayLike) -> tuple[Float64, npt.NDArray[np.int64], int]:
    """The rewards as float64, the group number of each, and how many groups there are."""
    values = np.asarray(rewards, dtype=np.float64)
    labels: npt.NDArray[Any] = np.asarray(groups, dtype=object)  # so that 1 and "1" stay different
    if values.ndim != 1 or labels.shape != values.shape:
        raise ValueError(
            f"rewards {values.shape} and groups {labels.shape} must be one-dimensional and of equal length: "
            "pass one group label for each reward"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(
            f"reward {int(bad[0])} is {values[bad[0]]}; rewards must be finite: let the reward function return a number"
        )
    known: dict[Any, int] = {}
    numbers = np.array([known.setdefault(label, len(known)) for label in labels.tolist()], np.int64)
    return values, numbers, len(known)


def _each_group(rewards: npt.ArrayLike, groups: npt.ArrayLike, function: Callable[[Float64], npt.ArrayLike]) -> Float64:
    """Apply `function` to the rewards of every group and put the results where they came from."""
    values, numbers, num_groups = _checked(rewards, groups)
    result = np.zeros_like(values)
    order = np.argsort(numbers, kind="stable")
    ends = np.cumsum(np.bincount(numbers, minlength=num_groups))
    for members in np.split(order, ends[:-1]) if num_groups else []:
        result[members] = function(values[members])
    return result


def _check_tau(tau: float) -> None:
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau is {tau}; it must be positive and finite: use a small positive value for a hard maximum")


def _mean(values: Float64) -> float:
    """The mean, exact when all values are equal."""
    return float(values[0] + (values - values[0]).mean())


def pmd_mean(
    rewards: npt.ArrayLike, groups: npt.ArrayLike, *, leave_one_out: bool = True, singleton: Singleton = "reward"
) -> Float64:
    """Reward minus the mean of the group's other members.

    Under leave-one-out a group of one has baseline 0, so its advantage is its reward; `singleton="zero"` gives 0
    instead. With itself in the baseline it always gets 0.

    Args:
        rewards: Reward of each trajectory [n].
        groups: Group label of each trajectory [n], integers or strings.
        leave_one_out: False compares with the mean of the whole group, as Kimi k1.5 does.
        singleton: What a group of one gets under leave-one-out.

    Returns:
        Advantages, float64 [n].

    Raises:
        ValueError: a reward is not finite, or the shapes differ.

    Source: arXiv:2501.12599 eq. 3; OpenKimi `rloo`.
    """
    if singleton not in ("reward", "zero"):
        raise ValueError(f"singleton is {singleton!r}; it must be 'reward' or 'zero'")

    def advantages(values: Float64) -> Float64:
        n = len(values)
        if n == 1:
            return values if leave_one_out and singleton == "reward" else np.zeros(1)
        shifted = values - values[0]
        if leave_one_out:
            return np.asarray(shifted - (shifted.sum() - shifted) / (n - 1))
        return np.asarray(shifted - shifted.mean())

    return _each_group(rewards, groups, advantages)


def pmd_partition(
    rewards: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    tau: float,
    leave_one_out: bool = True,
    floor: float | None = None,
) -> Float64:
    """Reward minus the log-partition estimate tau log mean exp(r / tau) of the group's other members.

    Exact and safe from overflow: the maximum of the others is subtracted before the exponential. As tau goes to 0
    the baseline is the maximum of the others. A group of one has baseline 0 under leave-one-out, else it gets 0.

    Args:
        rewards: Reward of each trajectory [n].
        groups: Group label of each trajectory [n].
        tau: KL regularization, positive.
        leave_one_out: False includes the trajectory itself, as Kimi k1.5 does.
        floor: Lower bound of mean exp((r - group maximum) / tau) before the logarithm; OpenKimi uses 1e-8.

    Returns:
        Advantages, float64 [n].

    Raises:
        ValueError: tau is not positive, a reward is not finite, or the shapes differ.

    Source: arXiv:2501.12599 sec. 2.3; OpenKimi `ploo`.
    """
    _check_tau(tau)
    if floor is not None and not 0 < floor <= 1:
        raise ValueError(f"floor is {floor}; it bounds a mean of values between 0 and 1: choose one in (0, 1], or None")

    def advantages(values: Float64) -> Float64:
        n = len(values)
        if n == 1:
            return values if leave_one_out else np.zeros(1)
        # Row i holds the rewards that trajectory i is compared with: [n, n - 1], or [n, n] with itself.
        compared = np.broadcast_to(values, (n, n))
        if leave_one_out:
            compared = compared[~np.eye(n, dtype=bool)].reshape(n, n - 1)
        if floor is not None:
            top = values.max()
            mean = np.exp((compared - top) / tau).mean(axis=1)
            return np.asarray((values - top) - tau * np.log(np.maximum(mean, floor)))
        top_of_row = compared.max(axis=1)
        # expm1 and log1p keep the digits when tau is large; the row's maximum keeps the argument above -1 + 1/n.
        excess = np.expm1((compared - top_of_row[:, None]) / tau).mean(axis=1)
        return np.asarray((values - top_of_row) - tau * np.log1p(excess))

    with np.errstate(over="ignore", under="ignore"):
        return _each_group(rewards, groups, advantages)


def boltzmann_weights(rewards: npt.ArrayLike, groups: npt.ArrayLike, *, tau: float) -> Float64:
    """exp(r / tau) over its group mean, the trajectory itself included; the mean weight of a group is 1.

    Args:
        rewards: Reward of each trajectory [n].
        groups: Group label of each trajectory [n].
        tau: Temperature of the Boltzmann target, positive.

    Returns:
        Weights, float64 [n].

    Raises:
        ValueError: tau is not positive, a reward is not finite, or the shapes differ.

    Source: arXiv:2605.02469; OpenKimi `compute_wpmd_weight`.
    """
    _check_tau(tau)

    def weights(values: Float64) -> Float64:
        scaled = np.exp((values - values.max()) / tau)
        return np.asarray(scaled / scaled.mean())

    with np.errstate(over="ignore", under="ignore"):
        return _each_group(rewards, groups, weights)


def keep_groups(
    rewards: npt.ArrayLike, groups: npt.ArrayLike, *, low: float | None = None, high: float | None = None
) -> npt.NDArray[np.bool_]:
    """Which trajectories belong to a group whose mean reward lies in the open interval (low, high).

    Args:
        rewards: Reward of each trajectory [n].
        groups: Group label of each trajectory [n].
        low: Lower bound; None is unbounded.
        high: Upper bound; None is unbounded.

    Returns:
        bool [n]; False drops the trajectory: its mask is emptied and it leaves the loss denominator.

    Raises:
        ValueError: a reward is not finite, or the shapes differ.
    """
    means = _each_group(rewards, groups, lambda values: np.full(len(values), _mean(values)))
    keep = np.ones(len(means), dtype=np.bool_)
    if low is not None:
        keep &= means > low
    if high is not None:
        keep &= means < high
    return keep


def grpo(rewards: npt.ArrayLike, groups: npt.ArrayLike, *, eps: float = 1e-6, scale_by_std: bool = True) -> Float64:
    """Reward minus group mean, over the group's standard deviation (n - 1 in its denominator) plus `eps`.

    A group of one has mean 0 and deviation 1, as in verl.

    Args:
        rewards: Reward of each trajectory [n].
        groups: Group label of each trajectory [n].
        eps: Added to the deviation.
        scale_by_std: False only subtracts the mean.

    Returns:
        Advantages, float64 [n].

    Raises:
        ValueError: a reward is not finite, or the shapes differ.

    Source: arXiv:2402.03300 sec. 4.1; verl `compute_grpo_outcome_advantage`.
    """

    def advantages(values: Float64) -> Float64:
        shifted = values - values[0]
        centered = shifted - shifted.mean() if len(values) > 1 else values
        if not scale_by_std:
            return np.asarray(centered)
        deviation = float(shifted.std(ddof=1)) if len(values) > 1 else 1.0
        return np.asarray(centered / (deviation + eps))

    return _each_group(rewards, groups, advantages)
