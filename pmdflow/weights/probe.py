"""The proof that an engine serves a version: its log-probs of a few fixed tokens against the learner's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmdflow.types import Float64

TOKENS = 64
"""Scored in one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the learner says of a version, for whoever loads it."""

    tokens: tuple[int, ...]
    """A sequence whose tokens after the first are scored."""
    scores: Float64
    """Their log-probs under the version."""
    initial: Float64
    """Their log-probs under the weights that the run began with."""
    limit: float
    """Nats that rounding in learner and engine may make of one of them."""
    by_median: bool
    """In half precision an expert may be chosen by a rounding, which changes a few tokens much."""


class LoadCheck:
    """Compares what an engine gives after each loading with what it gave before and with what the learner gives.

    Example:
        >>> check = LoadCheck(initial=np.array([-1.0, -2.0]))
        >>> probe = Probe(tokens=(1, 2, 3), scores=np.array([-1.5, -2.5]), initial=np.array([-1.0, -2.0]), limit=0.01,
        ...               by_median=False)
        >>> check.problem(probe, [-1.0, -2.0])
        'its log-probs of 2 fixed tokens are off by 0.5 nats, rounding is 0.01, and none changed with the weights'
        >>> check.problem(probe, [-1.5, -2.5])
    """

    def __init__(self, initial: Sequence[float] | Float64, *, is_known: bool = True) -> None:
        """Know what the engine gives before the first loading.

        Args:
            initial: For the weights that it has.
            is_known: These are those that it was made with; else the first loading may change nothing.
        """
        self._given, self._is_known = np.asarray(initial, np.float64), is_known
        self._expected: Float64 | None = None

    def problem(self, probe: Probe, scores: Sequence[float]) -> str | None:
        """What says that the version is not the one that is served; None: it is, and is compared with from now on.

        Args:
            probe: Of the version that was loaded.
            scores: What the engine gives now, for as many tokens as it could.
        """
        given, count = np.asarray(scores, np.float64), len(scores)
        expected = probe.scores[:count]
        before = (probe.initial if self._expected is None else self._expected)[:count]
        differences = np.abs(given - expected)
        off = float(np.median(differences) if probe.by_median else differences.max(initial=0.0))
        is_close = off <= probe.limit  # NaN is not
        changed = not np.array_equal(given, self._given[:count])
        must_change = self._is_known and not np.array_equal(expected, before)
        if is_close and (changed or not must_change):
            self._given, self._expected, self._is_known = given, probe.scores, True
            return None
        distance = f"its log-probs of {count} fixed tokens are off by {off:.2g} nats, rounding is {probe.limit:.2g}"
        return distance + (", and none changed with the weights" if must_change and not changed else "")
