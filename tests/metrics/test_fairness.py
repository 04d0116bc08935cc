"""Autocorrelation of batch lengths against NumPy, and what it says of series whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from pmdflow.metrics.fairness import FEWEST, lag_1


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
