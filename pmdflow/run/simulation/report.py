"""What a simulated run did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from pmdflow.metrics.fairness import lag_1, variation
from pmdflow.types import Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedIteration:
    """One claim, trained."""

    end_s: float
    """When its version was published."""
    wait_s: float
    """Time that the learner waited for its groups."""
    train_s: float
    publish_s: float
    lengths: Sequence[float]
    """Mean generated tokens of each group."""
    tokens: int
    """Generated tokens of its trajectories."""
    trained: int
    """Those with a gradient."""
    masked_by_decile: Sequence[float | None]
    """Share of generated tokens without one, by decile of length, shortest first."""
    staleness_mean: float
    staleness_max: int
    """Over tokens with a gradient; 0 without one."""
    ages: Mapping[int, int]
    """Tokens with a gradient by their age in iterations."""
    passed: int
    """Most younger groups that were trained before one of its groups."""


@dataclass(slots=True, kw_only=True)
class SimulationReport:
    """What a simulated run did; tokens are generated tokens."""

    iterations: list[SimulatedIteration] = field(default_factory=list)
    regrants: int = 0
    """Budgets that were granted once more without a step."""
    short_claims: int = 0
    """Claims of fewer groups than an iteration has."""
    max_groups_untrained: int = 0
    max_versions: int = 0
    """Most versions that trajectories were in flight of, the newest always counted."""
    groups_left: int = 0
    """Neither trained nor evicted at the end."""
    overspent_tokens: int = 0
    """Most by which a version's tokens exceeded its budget; 0 is the rule."""
    mixed_version: int = 0
    """Trained trajectories of more than one version."""
    ledger: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    busy_s: float = 0.0
    """Rollout actors' time with something to generate, all together."""
    waits_s: dict[str, float] = field(default_factory=dict)
    """Rollout actors' time with nothing to generate, by cause."""
    actors: int = 1

    def steady(self, *, skip: int) -> Steady:
        """Means over the iterations after the first `skip`.

        Raises:
            ValueError: there are none.
        """
        rest = self.iterations[skip:]
        if not rest:
            raise ValueError(f"{len(self.iterations)} iterations were simulated, {skip} of them skipped; simulate more")
        begin = self.iterations[skip - 1].end_s if skip else 0.0
        seconds = rest[-1].end_s - begin
        tokens = sum(iteration.tokens for iteration in rest)
        deciles = zip(*(iteration.masked_by_decile for iteration in rest), strict=True)
        known = ([share for share in decile if share is not None] for decile in deciles)
        return Steady(
            iteration_s=seconds / len(rest),
            tokens_per_s=tokens / seconds if seconds else 0.0,
            groups_per_s=sum(len(iteration.lengths) for iteration in rest) / seconds if seconds else 0.0,
            learner_busy=sum(iteration.train_s + iteration.publish_s for iteration in rest) / seconds
            if seconds
            else 0.0,
            masked_share=1 - sum(iteration.trained for iteration in rest) / tokens if tokens else 0.0,
            masked_by_decile=[fmean(shares) if shares else 0.0 for shares in known],
            staleness_mean=fmean(iteration.staleness_mean for iteration in rest),
            staleness_max=max(iteration.staleness_max for iteration in rest),
            passed=max(iteration.passed for iteration in rest),
            lag_1=lag_1([fmean(iteration.lengths) for iteration in rest]),
            variation=variation([iteration.lengths for iteration in rest]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """A run after its first iterations."""

    iteration_s: float
    tokens_per_s: float
    """Generated tokens of claims a second."""
    groups_per_s: float
    learner_busy: float
    """Share of the learner's time in which it trains or publishes."""
    masked_share: float
    masked_by_decile: Sequence[float]
    staleness_mean: float
    staleness_max: int
    passed: int
    lag_1: float | None
    """Of the mean length of claims; see `pmdflow.metrics.fairness`."""
    variation: float | None
    """Of the same, over that of a random draw."""


def group_means(claim: Claim) -> list[float]:
    """Mean generated tokens of each group of a claim."""
    lengths = np.diff(claim.cu_seqlens) - claim.prompt_lengths
    return [float(part.mean()) for part in np.split(lengths, claim.group_starts()[1:])]
