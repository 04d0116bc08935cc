"""The learning rate of a step, as a pure function of the steps taken."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmdflow.config.schema import LearnerConfig

FLOOR = 0.1
"""Share of `learner.lr` that a schedule ends at: a run that is continued beyond it still learns."""


def learning_rate(learner: LearnerConfig, *, steps_taken: int, steps_since_reset: int) -> float:
    """The rate of the next step: linear warm-up, then the schedule, times the warm-up after a reset.

    Args:
        learner: Rate, schedule and lengths.
        steps_taken: Steps of the whole run so far, skipped ones left out.
        steps_since_reset: Those of this iteration, for `reset_warmup_steps`.

    Example:
        >>> from pmdflow.config.schema import LearnerConfig
        >>> learner = LearnerConfig(lr=1.0, lr_schedule="linear", lr_decay_steps=10)
        >>> [round(learning_rate(learner, steps_taken=n, steps_since_reset=0), 2) for n in (0, 5, 10, 99)]
        [1.0, 0.55, 0.1, 0.1]
    """
    rate = learner.lr * _warm_up(steps_taken, learner.warmup_steps) * _decay(learner, steps_taken)
    return rate * _warm_up(steps_since_reset, learner.reset_warmup_steps)


def _warm_up(steps_taken: int, length: int) -> float:
    return min(1.0, (steps_taken + 1) / max(length, 1))


def _decay(learner: LearnerConfig, steps_taken: int) -> float:
    if learner.lr_schedule == "constant" or learner.lr_decay_steps is None:
        return 1.0
    length = learner.lr_decay_steps - learner.warmup_steps
    done = min(max((steps_taken - learner.warmup_steps) / length, 0.0), 1.0)
    left = 1.0 - done if learner.lr_schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
    return FLOOR + (1.0 - FLOOR) * left
