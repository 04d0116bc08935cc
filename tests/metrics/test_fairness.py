"""Autocorrelation of batch lengths against NumPy, and what it says of series whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from pmdflow.metrics.fairness import FEWEST, lag_1, variation


@pytest.mark.parametrize("seed", range(5))
def test_lag_1_agrees_with_numpy(seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(4.0, 0.5, 40) + np.arange(40)
    x = np.arange(40)
    rest = values - np.polyval(np.polyfit(x, values, 1), x)
    assert lag_1(values.tolist()) == pytest.approx((rest[1:] * rest[:-1]).sum() / (rest**2).sum(), abs=1e-9)


def test_it_tells_alternating_batches_from_fair_and_from_growing_ones() -> None:
    alternating = [86.0 if number % 2 else 45.0 for number in range(24)]
    assert (found := lag_1(alternating)) is not None and found < -0.9
    rng = np.random.default_rng(0)
    fair = [found for _ in range(200) if (found := lag_1(rng.normal(60, 18, 24).tolist())) is not None]
    assert abs(float(np.mean(fair))) < 0.15
    assert lag_1([30.0 + 2 * number for number in range(24)]) is None, "a line has no residual"
    assert lag_1([1.0, 2.0] * (FEWEST // 2 - 1)) is None


def test_variation_is_1_for_random_claims_and_more_for_segregated_ones() -> None:
    rng = np.random.default_rng(0)
    drawn = [variation(rng.lognormal(4, 1, (30, 16)).tolist()) for _ in range(100)]
    assert abs(float(np.mean([found for found in drawn if found is not None])) - 1) < 0.1
    groups = np.sort(rng.lognormal(4, 1, 480)).reshape(30, 16)
    segregated = variation(groups[rng.permutation(30)].tolist())
    assert segregated is not None and segregated > 3
    assert variation([[1.0, 2.0]] * (FEWEST - 1)) is None
