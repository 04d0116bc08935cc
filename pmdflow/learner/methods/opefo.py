"""OPEFO: gradients of tokens scaled so that a step neither raises nor lowers the entropy, to first order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.advantage import grpo
from pmdflow.learner.algorithm import Algorithm
from pmdflow.learner.losses import pmd
from pmdflow.learner.view import ClaimView, Credit, State
from pmdflow.types import Float64


def opefo(entropy_flow: npt.ArrayLike, *, cap: float | None = 0.5) -> tuple[float, Float64]:
    """Weights 1 + lambda where the flow is positive and 1 - lambda where it is negative, so that the sum becomes 0.

    Where all flows have one sign, lambda would be -1 or 1 and the whole update vanish: it is cut to [-cap, cap] (our
    choice; the paper's lambdas are below 0.002).

    Args:
        entropy_flow: First-order change of entropy that each token's part of the step makes [n].
        cap: Largest size of lambda; None does not cut it.

    Returns:
        lambda, and the weights, float64 [n].

    Raises:
        ValueError: a flow is not finite.

    Source: arXiv:2605.11491, with the exact flow: its printed eq. 6 leaves out the tokens that were not drawn.
    """
    flow = np.asarray(entropy_flow, np.float64)
    if not np.isfinite(flow).all():
        raise ValueError("a flow is not finite: leave out what is not trained")
    size = _lambda(float(flow[flow > 0].sum()), float(-flow[flow < 0].sum()), cap)
    return size, 1 + size * np.sign(flow)


def _lambda(rising: float, falling: float, cap: float | None) -> float:
    size = (falling - rising) / (falling + rising) if falling + rising > 0 else 0.0
    return size if cap is None else min(max(size, -cap), cap)


def _flow(view: ClaimView, learner: LearnerConfig) -> Float64:
    """What each token's part of the step makes of the entropy, up to a common factor [P]; 0 where it is not trained."""
    advantages = grpo(view.rewards, view.groups)
    if learner.aggregation == "seq-mean-token-mean":
        advantages = advantages / np.maximum(view.lengths, 1)
    return np.where(view.trained, advantages[view.episodes] * view.entropy_flow, 0.0)


def _totals(view: ClaimView, learner: LearnerConfig) -> dict[str, float]:
    flow = _flow(view, learner)
    return {"rising": float(flow[flow > 0].sum()), "falling": float(-flow[flow < 0].sum())}


def _credit(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    cap = float(learner.settings["cap"])
    rising, falling = view.totals["rising"], view.totals["falling"]
    size = _lambda(rising, falling, cap)
    return Credit(
        values=grpo(view.rewards, view.groups),
        per="sequence",
        token_weights=1 + size * np.sign(_flow(view, learner)),
        metrics={"lambda": size, "capped": float(abs(_lambda(rising, falling, None)) > cap)},
    )


OPEFO = Algorithm(
    credit=_credit,
    loss=pmd,
    needs=frozenset({"entropy_flow", "trained"}),
    totals=_totals,
    settings={"cap": 0.5},
)
"""Experimental: it is meant for one step an iteration and no lookahead; most of the paper's gain is being on-policy."""
