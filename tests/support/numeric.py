"""How far apart two ways of computing one quantity may come out, on any machine.

Floating point adds in the order that the processor, the library and the shapes suggest, so only a tolerance derived
from the computation holds everywhere: unit roundoff of the type x root of the number of roundings x what is added.
Rounding errors are as good as independent, hence the root. Source: Higham and Mary, SIAM J. Sci. Comput. 41 (2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike


def rounding(roundings: int, *, dtype: str = "float32") -> float:
    """How far two results may be apart that each round so often, relative to the largest number on the way."""
    return 2 * math.sqrt(roundings) * {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]


def assert_close(
    found: ArrayLike, expected: ArrayLike, *, roundings: int, size: float, dtype: str = "float32", name: str = ""
) -> None:
    """Assert equality up to rounding, relative to the value and to what it is made of.

    Args:
        found: One result.
        expected: The other.
        roundings: Roundings on the way to one value: sums one after another x terms of each.
        size: The largest number on the way, times how much the value moves with it; larger than the value where
            terms cancel.
        dtype: What the numbers are rounded to.
        name: Of the quantity, for the message.
    """
    share = rounding(roundings, dtype=dtype)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=share, atol=share * size, err_msg=name
    )


def assert_trained_alike(
    found: Mapping[str, ArrayLike], expected: Mapping[str, ArrayLike], *, lr: float, steps: int
) -> None:
    """Assert that two optimizers went the same way.

    Adam moves each weight by about `lr`, however small its gradient: where that is nothing but rounding, its sign and
    so the direction is chance. There are few such weights, and they cannot part by more than both ways.
    """
    assert found.keys() <= expected.keys()
    for name, values in found.items():
        apart = np.abs(np.asarray(values, np.float64) - np.asarray(expected[name], np.float64))
        assert apart.max() <= 2 * lr * steps, name
        assert (apart > lr / 10).sum() <= 1 + 1e-3 * apart.size, name
