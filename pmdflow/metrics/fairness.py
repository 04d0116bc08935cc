"""Whether batches are a fair draw of what was admitted: numbers of the series of a run's claims.

`status` waits for what this module imports: NumPy is not among it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, linear_regression, variance

FEWEST = 8
"""Claims below which an autocorrelation says nothing."""


def residuals(values: Sequence[float]) -> list[float]:
    """What is left of a series without its straight line: answers that grow in training are no unfairness."""
    slope, intercept = linear_regression(range(len(values)), values)
    return [value - slope * x - intercept for x, value in enumerate(values)]


def lag_1(values: Sequence[float]) -> float | None:
    """Autocorrelation of a series with itself one claim later, its straight line removed.

    Claims that alternate between long and short answers have about -0.7, independent ones about 0. None for fewer than
    `FEWEST` values, or if they lie on a line.

    Example:
        >>> lag_1([10.0, 50.0] * 10) < -0.9
        True
    """
    if len(values) < FEWEST:
        return None
    rest = residuals(values)
    total = sum(value * value for value in rest)
    if total <= 1e-12 * sum(value * value for value in values):
        return None
    return sum(one * other for one, other in pairwise(rest)) / total


def variation(claims: Sequence[Sequence[float]]) -> float | None:
    """How much the mean of claims varies, over how much it would if the same groups were dealt to them at random.

    1 is a fair draw. The mean's straight line is removed; None for fewer than `FEWEST` claims, or groups all alike.

    Args:
        claims: A number of each group, such as its mean length, for each claim.

    Example:
        >>> variation([[1.0, 9.0]] * 10)
        0.0
    """
    if len(claims) < FEWEST:
        return None
    each = variance([value for claim in claims for value in claim])
    if each == 0:
        return None
    found = sum(value * value for value in residuals([fmean(claim) for claim in claims])) / (len(claims) - 2)
    return float((found / (each * fmean(1 / len(claim) for claim in claims))) ** 0.5)
