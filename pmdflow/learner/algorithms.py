"""The table of algorithms: a name, how rewards become advantages, and the loss of one micro-batch.

A new algorithm is a pure function and a line in `ALGORITHMS`; one of your own is named in the config by import path,
`package.module:name`, and is an `Algorithm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pmdflow.config.combinations import ALGORITHM_NAMES
from pmdflow.config.imports import load_named
from pmdflow.config.schema import LearnerConfig
from pmdflow.learner import advantage, objective
from pmdflow.types import Float64, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The arguments of a loss: one micro-batch, packed over P generated tokens of B sequences."""

    logprobs: Tensor
    """log pi_theta [P], with gradient."""
    anchor: Tensor
    """Log-probs that the policy is compared with [P]: log pi_i, or those recorded at generation."""
    behavior: Tensor
    """Log-probs recorded at generation [P]."""
    advantages: Tensor
    """[B]"""
    weights: Tensor
    """Of the algorithm, times importance weights [B]; constants that never change a denominator."""
    trained: Tensor
    """bool [P]"""
    scope: Tensor
    """bool [P]: the tokens over which the sequence log-ratio u and the length L run."""
    cu_seqlens: Tensor
    """[B + 1]"""
    max_tokens: int
    """Most generated tokens of a trajectory."""

    def anchor_of(self, ratio: objective.Ratio) -> Tensor:
        """What a ratio is taken to [P]: CTPO's prefix ratio begins at the engine, the others at the anchor."""
        return self.behavior if ratio == "prefix" else self.anchor


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Pure functions and what the loss is a mean over.

    Example:
        >>> Algorithm(advantages=lambda rewards, groups, learner: rewards, loss=_pmd).mean_over
        'sequences'
    """

    advantages: Callable[[Float64, Int64, LearnerConfig], Float64]
    """Rewards [N] and group ids [N] to one value a trajectory [N]."""
    loss: Callable[[Terms, LearnerConfig], Tensor]
    """The mean loss of a micro-batch, a scalar; 0 if nothing in it is trained."""
    weights: Callable[[Float64, Int64, LearnerConfig], Float64] | None = None
    """Rewards and group ids to one weight a trajectory [N]; None is 1 for all."""
    clipped: Callable[[Terms, LearnerConfig], Tensor] | None = None
    """Trained tokens of a micro-batch whose objective is clipped, a count; None for an algorithm without a band."""
    mean_over: Literal["sequences", "tokens"] = "sequences"
    """What the loss divides by: sequences with a trained token, or trained tokens. The step's count replaces it."""


def _pmd(terms: Terms, learner: LearnerConfig) -> Tensor:
    return objective.pmd_loss(
        terms.logprobs,
        terms.anchor,
        terms.advantages,
        terms.trained,
        tau=learner.tau,
        aggregation=learner.aggregation,
        weights=terms.weights,
        cu_seqlens=terms.cu_seqlens,
        generated_mask=terms.scope,
        norm_length=terms.max_tokens,
    )


def _band(learner: LearnerConfig, own: tuple[float, float]) -> tuple[float, float]:
    """The clipping bounds: those of the config, else the algorithm's own."""
    return learner.clip_low or own[0], learner.clip_high or own[1]


# Our choice, as is the band of ctpo below: the sources give none.
_TOKEN_BAND = (0.5, 0.5)


def _token_pmd(terms: Terms, learner: LearnerConfig) -> Tensor:
    low, high = _band(learner, _TOKEN_BAND)
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


def _weighted_sft(terms: Terms, learner: LearnerConfig) -> Tensor:
    return objective.weighted_sft_loss(terms.logprobs, terms.trained, terms.weights, cu_seqlens=terms.cu_seqlens)


def _clipped(
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


def _ratio_clipping(
    loss: Callable[..., Tensor], ratio: objective.Ratio, own: tuple[float, float], *, logarithmic: bool = False
) -> Algorithm:
    """Normalized rewards and a loss that takes min(rho A, clip(rho) A), where `ratio` says what rho is."""

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

    return Algorithm(advantages=_normalized, loss=mean, clipped=_clipped(ratio, own, logarithmic=logarithmic))


def _mean(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.pmd_mean(rewards, groups, leave_one_out=learner.leave_one_out)


def _partition(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.pmd_partition(
        rewards, groups, tau=learner.tau, leave_one_out=learner.leave_one_out, floor=learner.partition_floor
    )


def _boltzmann(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.boltzmann_weights(rewards, groups, tau=learner.tau)


def _normalized(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.grpo(rewards, groups)


ALGORITHMS: dict[str, Algorithm] = {
    "pmd_mean": Algorithm(advantages=_mean, loss=_pmd),
    "pmd_partition": Algorithm(advantages=_partition, loss=_pmd),
    "boltzmann_pmd": Algorithm(advantages=_partition, loss=_pmd, weights=_boltzmann),
    "weighted_sft": Algorithm(advantages=_mean, loss=_weighted_sft, weights=_boltzmann),
    "token_pmd": Algorithm(
        advantages=_mean,
        loss=_token_pmd,
        clipped=_clipped("token-both-sides", _TOKEN_BAND, logarithmic=True),
        mean_over="tokens",
    ),
    "ctpo": _ratio_clipping(objective.ctpo_loss, "prefix", (0.2, 0.2), logarithmic=True),
    "grpo": _ratio_clipping(objective.grpo_loss, "token", (0.2, 0.2)),
    "gspo": _ratio_clipping(objective.gspo_loss, "sequence", (3e-4, 4e-4)),
}
"""Names that `learner.algorithm` knows."""
assert tuple(ALGORITHMS) == ALGORITHM_NAMES


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of a name in the table, or of an import path `package.module:name`.

    Raises:
        ValueError: there is none, or what the path names is not an `Algorithm`.
    """
    if ":" not in name:
        if name not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise ValueError(
                f"learner.algorithm is {name!r}: use one of {known}, or an import path package.module:name"
            )
        return ALGORITHMS[name]
    try:
        found = load_named(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"learner.algorithm {name!r} cannot be imported: {error}") from error
    if not isinstance(found, Algorithm):
        raise ValueError(f"learner.algorithm {name!r} is a {type(found).__name__}; make it an Algorithm")
    return found
