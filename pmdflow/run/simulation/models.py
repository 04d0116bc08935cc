"""Models of what a simulation does not run: the engine, the learner, the lengths of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np

Z_99 = 2.3263478740408408
"""The 99th percentile of a standard normal variable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """How long an engine generates: a step gives every running sequence one token."""

    slots: int
    """Sequences that it generates at a time."""
    step_s: float
    """Seconds of a step, however few sequences run."""
    sequence_s: float = 0.0
    """Seconds more for each running sequence."""
    context_s: float = 0.0
    """Seconds more for each token in the contexts of the running sequences."""
    prefill_s: float = 0.0
    """Seconds for each token of a prompt, or of a prefix that is continued."""
    apply_s: float = 0.0
    """Seconds that new weights stop it for."""
    training_factor: float = 1.0
    """How much longer a step takes while the learner trains: more than 1 where both share processors."""

    def steps_s(self, steps: int, *, running: int, context: float, training: bool) -> float:
        """Seconds of `steps` steps of `running` sequences, with so many tokens in their contexts on average."""
        step_s = self.step_s + self.sequence_s * running + self.context_s * context
        return steps * step_s * (self.training_factor if training else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerModel:
    """How long an iteration's training takes, with all ranks."""

    iteration_s: float
    """Seconds however small the claim is."""
    token_s: float = 0.0
    """Seconds more for each token of the claim."""
    publish_s: float = 0.0
    """Seconds from the last step until the next version is published and the learner is free."""

    def train_s(self, tokens: int) -> float:
        """Seconds of training on a claim of so many tokens."""
        return self.iteration_s + self.token_s * tokens


class Lengths(Protocol):
    """Draws generated tokens of the answers to a prompt."""

    def group(self, rng: np.random.Generator, size: int) -> Sequence[int]:
        """Lengths of the answers of one group, at least 1 each; longer ones are cut at `max_tokens`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalLengths:
    """Lognormal lengths."""

    median: float
    p99: float
    """99th percentile."""
    prompt_share: float = 0.5
    """Share of the variance of the logarithm that lies between prompts, and not between answers to one prompt."""

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm."""
        return math.log(self.p99 / self.median) / Z_99

    def mean(self, most: float) -> float:
        """Mean length where longer answers are cut at `most`."""
        normal = NormalDist()
        cut = math.log(most / self.median) / self.sigma
        below = self.median * math.exp(self.sigma**2 / 2) * normal.cdf(cut - self.sigma)
        return below + most * (1 - normal.cdf(cut))

    def group(self, rng: np.random.Generator, size: int) -> Sequence[int]:
        """Lengths of one group's answers."""
        sigma = self.sigma
        shared = rng.standard_normal() * math.sqrt(self.prompt_share)
        own = rng.standard_normal(size) * math.sqrt(1 - self.prompt_share)
        lengths = np.exp(math.log(self.median) + sigma * (shared + own))
        return [max(1, round(length)) for length in lengths.tolist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedLengths:
    """Lengths that a run's groups had; groups are drawn at random, and members of a drawn group if it is smaller."""

    groups: Sequence[Sequence[int]]

    def group(self, rng: np.random.Generator, size: int) -> Sequence[int]:
        """Lengths of one group's answers."""
        drawn = self.groups[int(rng.integers(len(self.groups)))]
        return list(drawn[:size]) if len(drawn) >= size else [drawn[i] for i in rng.integers(len(drawn), size=size)]
