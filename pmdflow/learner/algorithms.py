"""The table of algorithms: a name, how rewards become advantages, and the loss of one micro-batch.

A new algorithm is a pure function and a line in `ALGORITHMS`; one of your own is named in the config by import path,
`package.module:name`, and is an `Algorithm`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

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
    trained: Tensor
    """bool [P]"""
    scope: Tensor
    """bool [P]: the tokens over which the sequence log-ratio u and the length L run."""
    cu_seqlens: Tensor
    """[B + 1]"""
    max_tokens: int
    """Most generated tokens of a trajectory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Two pure functions and what the loss is a mean over.

    Example:
        >>> Algorithm(advantages=lambda rewards, groups, learner: rewards, loss=_pmd).mean_over
        'sequences'
    """

    advantages: Callable[[Float64, Int64, LearnerConfig], Float64]
    """Rewards [N] and group ids [N] to one value a trajectory [N]."""
    loss: Callable[[Terms, LearnerConfig], Tensor]
    """The mean loss of a micro-batch, a scalar; 0 if nothing in it is trained."""
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
        cu_seqlens=terms.cu_seqlens,
        generated_mask=terms.scope,
        norm_length=terms.max_tokens,
    )


def _token_pmd(terms: Terms, learner: LearnerConfig) -> Tensor:
    # The band is our choice: the paper gives none.
    return objective.token_pmd_loss(
        terms.logprobs,
        terms.anchor,
        terms.advantages,
        terms.trained,
        alpha=-0.5,
        beta=0.5,
        tau=learner.tau,
        cu_seqlens=terms.cu_seqlens,
    )


def _ctpo(terms: Terms, learner: LearnerConfig) -> Tensor:
    # The band is our choice: the summary that we read gives none.
    return objective.ctpo_loss(
        terms.logprobs,
        terms.behavior,
        terms.advantages,
        terms.trained,
        eps_low=0.2,
        eps_high=0.2,
        cu_seqlens=terms.cu_seqlens,
    )


def _weighted_sft(terms: Terms, learner: LearnerConfig) -> Tensor:
    return objective.weighted_sft_loss(terms.logprobs, terms.trained, terms.advantages, cu_seqlens=terms.cu_seqlens)


def _grpo(terms: Terms, learner: LearnerConfig) -> Tensor:
    return objective.grpo_loss(
        terms.logprobs, terms.anchor, terms.advantages, terms.trained, cu_seqlens=terms.cu_seqlens
    )


def _gspo(terms: Terms, learner: LearnerConfig) -> Tensor:
    return objective.gspo_loss(
        terms.logprobs, terms.anchor, terms.advantages, terms.trained, cu_seqlens=terms.cu_seqlens
    )


def _mean(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.pmd_mean(rewards, groups)


def _partition(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.pmd_partition(rewards, groups, tau=learner.tau)


def _boltzmann(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.boltzmann_weights(rewards, groups, tau=learner.tau)


def _normalized(rewards: Float64, groups: Int64, learner: LearnerConfig) -> Float64:
    return advantage.grpo(rewards, groups)


ALGORITHMS: dict[str, Algorithm] = {
    "pmd_mean": Algorithm(advantages=_mean, loss=_pmd),
    "pmd_partition": Algorithm(advantages=_partition, loss=_pmd),
    "token_pmd": Algorithm(advantages=_mean, loss=_token_pmd, mean_over="tokens"),
    "weighted_sft": Algorithm(advantages=_boltzmann, loss=_weighted_sft),
    "ctpo": Algorithm(advantages=_normalized, loss=_ctpo),
    "grpo": Algorithm(advantages=_normalized, loss=_grpo),
    "gspo": Algorithm(advantages=_normalized, loss=_gspo),
}
"""Names that `learner.algorithm` knows."""


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
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"learner.algorithm {name!r} cannot be imported: {error}") from error
    if not isinstance(found, Algorithm):
        raise ValueError(f"learner.algorithm {name!r} is a {type(found).__name__}; make it an Algorithm")
    return found
