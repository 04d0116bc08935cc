"""How the groups of a claim stand in the order of admission: how long they took, and what has passed them."""

from __future__ import annotations

from bisect import bisect, bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pmdflow.metrics.claim import by_decile, claim_metrics, episode_lengths
from pmdflow.types import Claim, Float64, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What this needs of a claim, and its other numbers: made where the claim is, which nobody else has to fetch."""

    iteration: int
    groups: Int64
    """Group of each episode [E]."""
    lengths: Int64
    """Generated tokens of each episode [E]."""
    metrics: Mapping[str, Any]
    """Those of `claim_metrics`."""

    @classmethod
    def of(cls, claim: Claim) -> Self:
        """Look at a claim."""
        groups, metrics = claim.groups[claim.first_branches()], claim_metrics(claim)
        return cls(iteration=claim.iteration, groups=groups, lengths=episode_lengths(claim), metrics=metrics)


class AdmissionOrder:
    """Follows groups from admission to training; group ids ascend in the order of admission.

    It knows the groups that were admitted since it was made: delays and bypasses of older ones, which a restart leaves
    behind, are unknown and left out.

    Example:
        >>> order = AdmissionOrder()
        >>> order.admitted([0, 1, 2], iteration=1)
        >>> order.claimed(claim, oldest_untrained=1)["trajectory/delay_mean"]  # doctest: +SKIP
        0.0
    """

    def __init__(self) -> None:
        """Know no group."""
        self._admitted: dict[int, int] = {}
        """Iteration under way at the admission of each group that is not trained."""
        self._trained: list[int] = []
        """Trained groups that an untrained one is older than, ascending."""
        self._ahead: dict[int, tuple[float, int]] = {}
        """Of each of these: generated tokens and episodes."""

    def admitted(self, groups: Iterable[int], *, iteration: int) -> None:
        """Groups are admitted while `iteration` is under way."""
        self._admitted.update(dict.fromkeys(groups, iteration))

    def claimed(self, claim: Claimed, *, oldest_untrained: int | None) -> dict[str, Any]:
        """Take a claim that was trained; its keys of an iteration's metrics.

        Args:
            claim: What is asked of the claim.
            oldest_untrained: Group that is still to be trained; None if none is.
        """
        groups, lengths = claim.groups, claim.lengths
        ids, inverse = np.unique(groups, return_inverse=True)
        known = [int(group) for group in ids if int(group) in self._admitted]
        delays = {group: claim.iteration - self._admitted.pop(group) for group in known}
        bypasses = {group: len(self._trained) - bisect(self._trained, group) for group in known}
        for place, group in enumerate(map(int, ids)):
            if group not in self._ahead:
                insort(self._trained, group)
            own = inverse == place
            self._ahead[group] = (float(lengths[own].sum()), int(own.sum()))
        return {
            **_summary("trajectory/delay", delays, groups, lengths),
            **_summary("trajectory/bypasses", bypasses, groups, lengths),
            "trajectory/length_in_order_mean": self._leave(oldest_untrained),
        }

    def _leave(self, oldest: int | None) -> float | None:
        """Mean tokens of the trained groups that no untrained one is older than any more, which are forgotten."""
        end = len(self._trained) if oldest is None else bisect_left(self._trained, oldest)
        left = [self._ahead.pop(group) for group in self._trained[:end]]
        del self._trained[:end]
        for group in [group for group in self._admitted if oldest is not None and group < oldest]:
            del self._admitted[group]  # evicted
        episodes = sum(number for _, number in left)
        return sum(tokens for tokens, _ in left) / episodes if episodes else None


def _summary(key: str, of_groups: dict[int, int], groups: Any, lengths: Any) -> dict[str, Any]:
    values: Float64 = np.array([of_groups.get(int(group), np.nan) for group in groups])
    known = ~np.isnan(values)
    found = by_decile(lengths[known], values[known], np.ones(int(known.sum())))
    return {
        f"{key}_mean": float(values[known].mean()) if known.any() else None,
        f"{key}_max": int(values[known].max()) if known.any() else None,
        f"{key}_by_decile": found,
    }
