"""UCPO: among the right answers of a group, the rare ones get more of the credit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.advantage import grpo
from pmdflow.learner.algorithm import Algorithm
from pmdflow.learner.losses import pmd
from pmdflow.learner.view import ClaimView, Credit, State
from pmdflow.types import Float64

FLOOR = 1e-6
"""Of a right answer's share of probability. Source: the released code."""


def ucpo(
    rewards: npt.ArrayLike,
    groups: npt.ArrayLike,
    mean_logprobs: npt.ArrayLike,
    correct: npt.ArrayLike,
    *,
    tau: float = 0.2,
    eps: float = 1e-8,
) -> Float64:
    """GRPO, a group's right answers sharing theirs anew: (1 - tau) / n + tau (1 / q) / (sum of 1 / q) each.

    q is the softmax over the n right answers of their mean log-probs, 1e-6 at least. The sum over the right answers
    stays what it was, also where their rewards differ; one right answer alone, and wrong ones, keep GRPO's credit.

    `mean_logprobs` [n] are means over each trajectory's tokens of log pi_i: one policy for all, whoever generated them.
    A `tau` of 0 gives all right answers equal shares, 1 shares by rarity alone.

    Raises:
        ValueError: tau is not between 0 and 1, a value is not finite, or the shapes differ.

    Source: arXiv:2605.00365 and its released code, which differ in nothing that matters here: that divides the
    log-probs by the lengths although a comment says otherwise.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau is {tau}; it is a share: choose one between 0 and 1")
    credit = grpo(rewards, groups, eps=eps)
    means, right = np.asarray(mean_logprobs, np.float64), np.asarray(correct, np.bool_)
    if means.shape != credit.shape or right.shape != credit.shape:
        raise ValueError(f"mean_logprobs {means.shape} and correct {right.shape} must be like rewards {credit.shape}")
    labels = np.asarray(groups)
    for label in np.unique(labels[right]):
        members = np.flatnonzero((labels == label) & right)
        if len(members) > 1:
            q = np.exp(means[members] - means[members].max())
            rare = 1 / np.maximum(q / q.sum(), FLOOR)
            share = (1 - tau) / len(members) + tau * rare / rare.sum()
            credit[members] = credit[members].sum() * share
    return credit


def _credit(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    means = view.episode_means(view.reference)
    values = ucpo(view.rewards, view.groups, means, view.correct, tau=float(learner.settings["share"]))
    return Credit(values=values, per="sequence")


UCPO = Algorithm(credit=_credit, loss=pmd, needs=frozenset({"reference"}), settings={"share": 0.2})
"""Under policy mirror descent; the setting `share` is the paper's tau, for `learner.tau` is another thing."""
