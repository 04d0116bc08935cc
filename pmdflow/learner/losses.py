"""The losses of `objective` as an `Algorithm` takes them: of one micro-batch, with the settings of the learner."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner import objective
from pmdflow.learner.algorithm import Algorithm, CreditFunction, Terms

# Our choice, as is the band of ctpo: the sources give none.
TOKEN_BAND = (0.5, 0.5)
"""Bounds of |log rho| that `token_pmd` has unless the config sets them."""


def pmd(terms: Terms, learner: LearnerConfig) -> Tensor:
    """Squared residual of the sequence log-ratio; credit is one a sequence."""
    return objective.pmd_loss(
        terms.logprobs,
        terms.anchor,
        terms.advantages,
        terms.trained,
        generated_mask=terms.scope,
        **_mirror(terms, learner),
    )


def pmd_tokens(terms: Terms, learner: LearnerConfig) -> Tensor:
    """The same gradient with credit that may be one a token."""
    return objective.pmd_token_loss(
        terms.logprobs,
        terms.anchor,
        terms.token_advantages,
        terms.trained,
        generated_mask=terms.scope,
        **_mirror(terms, learner),
    )


def _mirror(terms: Terms, learner: LearnerConfig) -> dict[str, Any]:
    return {
        "tau": learner.tau,
        "aggregation": learner.aggregation,
        "weights": terms.weights,
        "cu_seqlens": terms.cu_seqlens,
        "norm_length": terms.max_tokens,
    }


def token_pmd(terms: Terms, learner: LearnerConfig) -> Tensor:
    """Clipped token ratios and a squared pull back (Kimi K2.5)."""
    low, high = _band(learner, TOKEN_BAND)
    return objective.token_pmd_loss(
        terms.logprobs,
        terms.anchor,
        terms.advantages,
        terms.trained,
        alpha=-low,
        beta=high,
        tau=learner.tau,
        weights=terms.weights,
        cu_seqlens=terms.cu_seqlens,
    )


def weighted_sft(terms: Terms, learner: LearnerConfig) -> Tensor:
    """Supervised learning on weighted samples (BOLT)."""
    return objective.weighted_sft_loss(terms.logprobs, terms.trained, terms.weights, cu_seqlens=terms.cu_seqlens)


def clipped_count(
    ratio: objective.Ratio, own: tuple[float, float], *, logarithmic: bool
) -> Callable[[Terms, LearnerConfig], Tensor]:
    """Count clipped tokens; a `logarithmic` band bounds log rho at -low and high, another rho at 1 - low, 1 + high."""

    def count(terms: Terms, learner: LearnerConfig) -> Tensor:
        low, high = _band(learner, own)
        return objective.clipped_tokens(
            terms.logprobs,
            terms.anchor_of(ratio),
            terms.advantages,
            terms.trained,
            ratio=ratio,
            low=-low if logarithmic else math.log1p(-low),
            high=high if logarithmic else math.log1p(high),
            cu_seqlens=terms.cu_seqlens,
        )

    return count


def ratio_clipping(
    credit: CreditFunction,
    loss: Callable[..., Tensor],
    ratio: objective.Ratio,
    own: tuple[float, float],
    *,
    logarithmic: bool = False,
) -> Algorithm:
    """Credit, one a sequence, and a loss that takes min(rho A, clip(rho) A), where `ratio` says what rho is."""

    def mean(terms: Terms, learner: LearnerConfig) -> Tensor:
        low, high = _band(learner, own)
        return loss(
            terms.logprobs,
            terms.anchor_of(ratio),
            # The minimum is linear in A where A keeps its sign: the weight of a sequence is a factor of A.
            terms.advantages * terms.weights,
            terms.trained,
            eps_low=low,
            eps_high=high,
            cu_seqlens=terms.cu_seqlens,
        )

    return Algorithm(credit=credit, loss=mean, clipped=clipped_count(ratio, own, logarithmic=logarithmic))


def _band(learner: LearnerConfig, own: tuple[float, float]) -> tuple[float, float]:
    """The clipping bounds: those of the config, else the algorithm's own."""
    return learner.clip_low or own[0], learner.clip_high or own[1]
