"""On-policy distillation: tokens of the student judged by the log-probs of a teacher."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.algorithm import Algorithm
from pmdflow.learner.losses import pmd_tokens
from pmdflow.learner.view import ClaimView, Credit, State
from pmdflow.types import Float64


def opd(teacher_logprobs: npt.ArrayLike, student_logprobs: npt.ArrayLike, *, clip: float | None = None) -> Float64:
    """log pi_T - log pi_S of each token of the student, cut to [-clip, clip]: its mean is -KL(student || teacher).

    Raises:
        ValueError: the shapes differ, or clip is not positive.

    Source: arXiv:2604.13010 (with a frozen teacher, scored once on stored rollouts: Lightning OPD).
    """
    teacher, student = np.asarray(teacher_logprobs, np.float64), np.asarray(student_logprobs, np.float64)
    if teacher.shape != student.shape:
        raise ValueError(f"teacher {teacher.shape} and student {student.shape} must score the same tokens")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; it must be positive, or None")
    credit = teacher - student
    return credit if clip is None else np.clip(credit, -clip, clip)


def vopd(
    student_topk: npt.ArrayLike,
    teacher_topk: npt.ArrayLike,
    student_logprobs: npt.ArrayLike,
    teacher_logprobs: npt.ArrayLike,
) -> Float64:
    """log pi_T - log pi_S of the token that was drawn, plus KL(student || teacher) there, its baseline.

    With all tokens among the K the mean under the student is exactly 0. The K log-probs are taken as they are, not
    normalized among themselves.

    Args:
        student_topk: Log-probs of K tokens under the student [T, K]; -inf is a token that it never draws.
        teacher_topk: Of the same tokens under the teacher [T, K].
        student_logprobs: Of the drawn tokens [T].
        teacher_logprobs: Likewise [T].

    Returns:
        float64 [T].

    Raises:
        ValueError: the shapes do not fit.

    Source: arXiv:2605.07865.
    """
    own, other = np.asarray(student_topk, np.float64), np.asarray(teacher_topk, np.float64)
    credit = opd(teacher_logprobs, student_logprobs)
    if own.ndim != 2 or own.shape != other.shape or own.shape[:1] != credit.shape:
        raise ValueError(
            f"student_topk {own.shape} and teacher_topk {other.shape} must be [T, K] of the {credit.shape} drawn tokens"
        )
    drawn = own > -np.inf
    terms = np.exp(own) * (np.where(drawn, own, 0.0) - np.where(drawn, other, 0.0))
    return np.asarray(credit + np.where(drawn, terms, 0.0).sum(axis=1))


def _plain(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    clip = float(learner.settings["clip"])
    return _told(view, opd(view.teacher, view.reference, clip=clip or None))


def _with_baseline(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    return _told(view, vopd(view.student_top, view.teacher_top, view.reference, view.teacher))


def _told(view: ClaimView, values: Float64) -> Credit:
    means = view.episode_means(view.reference - view.teacher)
    return Credit(values=values, per="token", metrics={"teacher_kl": float(means.mean()) if view.num_episodes else 0.0})


OPD = Algorithm(credit=_plain, loss=pmd_tokens, needs=frozenset({"teacher", "reference"}), settings={"clip": 0.0})
"""A `clip` of 0 does not cut. Rewards have no part in it."""
VOPD = Algorithm(credit=_with_baseline, loss=pmd_tokens, needs=frozenset({"teacher", "reference", "top"}))
"""The baseline is the KL over the `TOP` likeliest tokens under pi_i."""
