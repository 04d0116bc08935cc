"""A-NSR: fixed credit for right and wrong answers whose sizes follow the iteration."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.algorithm import Algorithm
from pmdflow.learner.losses import pmd
from pmdflow.learner.view import ClaimView, Credit, State
from pmdflow.types import Float64

Schedule = Literal["exponential", "cosine", "accuracy"]


def negative_reinforcement(
    correct: npt.ArrayLike,
    *,
    iteration: float,
    total: float,
    schedule: Schedule = "exponential",
    beta_min: float = 0.5,
    beta_max: float = 1.5,
    kappa: float = 0.03,
    lambda_min: float = 0.05,
    lambda_max: float = 0.2,
    accuracy: float | None = None,
) -> Float64:
    """+lambda for right answers and -beta for wrong ones, without a baseline.

    lambda rises by a line from `lambda_min` to `lambda_max` over `total` iterations. beta falls from `beta_max` to
    `beta_min`: by exp(-kappa t), by half a cosine over `total`, or with the accuracy of the claim.

    `iteration` is t. `accuracy` is that of the whole claim where `correct` [n] is a part of it; None is its mean.

    Raises:
        ValueError: the schedule is not known, or `total` is not positive.

    Source: arXiv:2605.07137 (A-NSR).
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {schedule!r}; use one of {', '.join(get_args(Schedule))}")
    if not total > 0:
        raise ValueError(f"total is {total}; it must be positive")
    right = np.asarray(correct, np.bool_)
    progress = min(max(iteration / total, 0.0), 1.0)
    if schedule == "exponential":
        left = math.exp(-kappa * iteration)
    elif schedule == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    else:
        left = 1 - (accuracy if accuracy is not None else float(right.mean()) if right.size else 0.0)
    beta = beta_min + (beta_max - beta_min) * left
    return np.where(right, lambda_min + (lambda_max - lambda_min) * progress, -beta)


def _credit(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    given = {name: value for name, value in learner.settings.items() if name != "schedule"}
    accuracy = view.totals["correct"] / max(view.totals["episodes"], 1)
    values = negative_reinforcement(
        view.correct,
        iteration=view.iteration,
        schedule=learner.settings["schedule"],  # type: ignore[arg-type]
        accuracy=accuracy,
        **given,  # type: ignore[arg-type]
    )
    return Credit(values=values, per="sequence")


A_NSR = Algorithm(
    credit=_credit,
    loss=pmd,
    totals=lambda view, learner: {"correct": float(view.correct.sum()), "episodes": float(view.num_episodes)},
    settings={
        "total": 1000.0,
        "schedule": "exponential",
        "beta_min": 0.5,
        "beta_max": 1.5,
        "kappa": 0.03,
        "lambda_min": 0.05,
        "lambda_max": 0.2,
    },
)
"""Under policy mirror descent: without a baseline `learner.tau` matters more, for it alone holds the policy back."""
