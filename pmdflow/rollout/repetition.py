"""Early end of trajectories that only repeat themselves. Source: arXiv:2501.12599 fig. 3b."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PERIOD = 64
"""Longest block, in tokens, whose repetition is looked for."""


def repeats(tokens: Sequence[int], *, times: int) -> bool:
    """Whether the last tokens are `times` copies of one block of at most `MAX_PERIOD` tokens.

    Example:
        >>> repeats([7, 1, 2, 1, 2, 1, 2], times=3)
        True
    """
    for period in range(1, min(MAX_PERIOD, len(tokens) // times) + 1):
        length = period * times
        # A run of period p is its own copy, shifted by p.
        if tokens[-1] == tokens[-1 - period] and tokens[-length:-period] == tokens[len(tokens) - length + period :]:
            return True
    return False
