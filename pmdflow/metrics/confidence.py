"""Confidence intervals of means over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
_AT_A_TIME = 500


def wilson(mean: float, trials: int) -> tuple[float, float]:
    """Wilson score interval of a share, or of a mean of `trials` independent values in [0, 1].

    Such values vary at most as much as successes and failures of the same mean, so for them it is conservative; unlike
    an interval from their spread it does not shrink to a point when all are equal.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.

    Example:
        >>> low, high = wilson(1.0, 20)
        >>> round(low, 3), high
        (0.839, 1.0)
    """
    if not trials:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = mean + z * z / (2 * trials)
    spread = z * math.sqrt(max(mean * (1 - mean), 0.0) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent values; the same values give the same interval.

    Raises:
        ValueError: no value.
    """
    if not len(values):
        raise ValueError("the mean of no values has no interval")
    rng = np.random.default_rng(0)
    data = np.asarray(values, np.float64)
    draws = (rng.integers(len(data), size=(_AT_A_TIME, len(data))) for _ in range(RESAMPLES // _AT_A_TIME))
    means = np.concatenate([data[draw].mean(axis=1) for draw in draws])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
