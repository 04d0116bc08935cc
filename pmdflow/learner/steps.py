"""The optimizer steps of one iteration: micro-batches on the device, their gradients, and the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmdflow.config.schema import Config
from pmdflow.errors import PmdflowError
from pmdflow.learner.algorithms import Algorithm, Terms
from pmdflow.learner.batch import StepPlan
from pmdflow.learner.fsdp import clip_gradients
from pmdflow.learner.layout import masked
from pmdflow.learner.objective import sequence_log_ratio, weighted_sft_loss
from pmdflow.learner.policy import Policy
from pmdflow.learner.routing import EXPERTS
from pmdflow.learner.sums import StepSums, added, over_ranks
from pmdflow.learner.tensors import Tensors as Tensors
from pmdflow.learner.tensors import tokens_of_rows
from pmdflow.learner.token_scores import TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """The supervised sequences of one step."""

    micros: Sequence[Tensors]
    """This rank's."""
    num_sequences: float
    """Over all ranks."""


def evaluate(policy: Policy, micro: Tensors, **more: Any) -> TokenScores:
    """Log-probs and entropies [P] of the micro-batch's generated tokens under the policy, with gradient.

    `more` asks for more, as `Policy.forward` does.
    """
    if policy.routing is not None and EXPERTS in micro.columns:
        more["experts"] = torch.from_numpy(micro.columns[EXPERTS].astype(np.int64)).to(micro.tokens.device)
    scores: TokenScores = policy(micro.tokens, micro.layout, micro.positions, micro.targets, micro.temperatures, **more)
    return scores


@torch.no_grad()
def reference_pass(
    policy: Policy, micros: Sequence[Tensors], *, flow: bool = False, top: int = 0, at: str | None = None
) -> list[TokenScores]:
    """What pi_i says of every generated token, in the very micro-batches of the steps, so that u is 0 at the first.

    `at` is the column with the ids of the other tokens that are asked for, instead of the likeliest.
    """

    def others(micro: Tensors) -> dict[str, Any]:
        return {"top": top} if at is None or not len(micro.trajectories) else {"at": _ids(micro, at)}

    return [evaluate(policy, micro, flow=flow, **others(micro)) for micro in micros]


def _ids(micro: Tensors, name: str) -> Tensor:
    """A column of token ids [P, K]."""
    return torch.from_numpy(micro.columns[name].astype(np.int64)).to(micro.targets.device)


@torch.no_grad()
def teacher_pass(teacher: Policy, micros: Sequence[Tensors], scores: Sequence[TokenScores]) -> list[TokenScores]:
    """What a teacher says of the same tokens, and of those that are the likeliest under pi_i where these are known."""
    return [evaluate(teacher, micro, at=own.top) for micro, own in zip(micros, scores, strict=True)]


def mismatch_sums(micro: Tensors, logprobs: Tensor) -> StepSums:
    """log behavior - log learner over tokens of the newest version, and nothing else."""
    difference = (micro.behavior.double() - logprobs.detach().double())[micro.newest]
    return StepSums(mismatch=float(difference.sum()), mismatch_tokens=float(difference.numel()))


def accumulate(
    policy: Policy,
    micros: Sequence[Tensors],
    anchors: Sequence[Tensor],
    *,
    supervised: Supervised | None,
    algorithm: Algorithm,
    config: Config,
    plan: StepPlan,
) -> StepSums:
    """Add the gradient of all micro-batches of a step; their sums over all ranks.

    Each micro-batch's mean is turned into its part of the mean over the whole step, so neither the split into
    micro-batches nor the one into ranks changes the gradient.

    Args:
        policy: The sharded policy.
        micros: This rank's micro-batches; every rank has equally many.
        anchors: Log-probs to compare with, for each micro-batch.
        supervised: What the supervised loss is computed on; None without one.
        algorithm: Gives the loss and says what it is a mean over.
        config: The run's.
        plan: The denominators over all ranks.
    """
    parts = [
        _backward(policy, micro, anchor, algorithm=algorithm, config=config, plan=plan)
        for micro, anchor in zip(micros, anchors, strict=True)
    ]
    if supervised is not None:
        parts.append(_supervised_backward(policy, supervised, weight=config.learner.ptx_weight))
    return over_ranks(added(StepSums, parts), micros[0].tokens.device)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, sums: StepSums, *, max_grad_norm: float, where: str
) -> float:
    """Clip the accumulated gradient and step; the gradient's norm before.

    Args:
        policy: Holds the gradient.
        optimizer: Its learning rate is set.
        sums: The step's.
        max_grad_norm: What the norm is clipped to.
        where: Names iteration and step in errors.

    Raises:
        PmdflowError: the gradient is not finite; the weights are unchanged.
    """
    norm = clip_gradients([p for p in policy.parameters() if p.requires_grad], max_grad_norm)
    if not np.isfinite(norm):
        raise PmdflowError(
            f"the gradient norm is {norm} at {where} (loss {sums.loss}); the weights were not changed: look for "
            "non-finite rewards or log-probs in the claim, or lower learner.lr"
        )
    optimizer.step()
    optimizer.zero_grad()
    return norm


def _backward(
    policy: Policy, micro: Tensors, anchor: Tensor, *, algorithm: Algorithm, config: Config, plan: StepPlan
) -> StepSums:
    """Add one micro-batch's gradient; its part of the sums."""
    learner = config.learner
    real = len(micro.trajectories) > 0
    named = algorithm.alternatives if real else None
    scores = evaluate(policy, micro, alternatives=None if named is None else _ids(micro, named))
    logprobs, entropies = scores.logprobs, scores.entropies
    bonus: Tensor | float = 0.0
    if learner.entropy_weight > 0:
        bonus = learner.entropy_weight * masked(micro.trained, entropies).sum() / plan.num_tokens
    terms = _terms(micro, _weighed(logprobs, micro.token_weights), entropies, anchor, config)
    terms = replace(terms, alternatives=scores.alternatives, iteration=micro.iteration)
    denominator = plan.num_sequences if algorithm.mean_over == "sequences" else plan.weighted_tokens
    # What only keeps pace has no columns that a loss might read.
    own_loss = algorithm.loss(terms, learner) if real else 0.0 * logprobs.sum()
    loss = own_loss * (_count(terms, algorithm) / denominator) - bonus
    loss.backward()
    own = StepSums(
        loss=float(loss.detach()),
        entropy=float(entropies.detach().double().sum()) if real else 0.0,
        entropy_tokens=float(len(entropies)) if real else 0.0,
        clipped=0.0 if algorithm.clipped is None or not real else float(algorithm.clipped(terms, learner)),
    )
    return added(StepSums, [own, _u_sums(terms), mismatch_sums(micro, logprobs)])


def _supervised_backward(policy: Policy, supervised: Supervised, *, weight: float) -> StepSums:
    """Add the gradient of the supervised loss; this rank's part of the loss, without its weight."""
    total = 0.0
    for micro in supervised.micros:
        logprobs = evaluate(policy, micro).logprobs
        loss = weighted_sft_loss(logprobs, micro.trained, micro.weights, cu_seqlens=micro.cu_seqlens)
        part = loss * (int((tokens_of_rows(micro.trained, micro.cu_seqlens) > 0).sum()) / supervised.num_sequences)
        (weight * part).backward()
        total += float(part.detach())
    return StepSums(supervised=total)


def _weighed(logprobs: Tensor, weights: Tensor | None) -> Tensor:
    """The same values, with gradients times the weights."""
    if weights is None:
        return logprobs
    factor = weights.to(logprobs.dtype)
    fixed = logprobs.detach()
    return fixed + factor * (logprobs - fixed)


def _terms(micro: Tensors, logprobs: Tensor, entropies: Tensor, anchor: Tensor, config: Config) -> Terms:
    generated = config.learner.u_scope == "generated"
    return Terms(
        logprobs=logprobs,
        entropies=entropies,
        anchor=anchor,
        behavior=micro.behavior,
        sequence_credit=micro.sequence_credit,
        token_credit=micro.token_credit,
        weights=micro.weights,
        trained=micro.trained,
        scope=torch.ones_like(micro.trained) if generated else micro.trained,
        cu_seqlens=micro.cu_seqlens,
        max_tokens=config.data.max_tokens,
        columns={name: torch.from_numpy(own).to(logprobs.device) for name, own in micro.columns.items()},
    )


def _count(terms: Terms, algorithm: Algorithm) -> int:
    counts = tokens_of_rows(terms.trained, terms.cu_seqlens)
    return int((counts > 0).sum() if algorithm.mean_over == "sequences" else counts.sum())


@torch.no_grad()
def _u_sums(terms: Terms) -> StepSums:
    """Sums over trained sequences of u, u^2, 1 and the tokens under u."""
    active = tokens_of_rows(terms.trained, terms.cu_seqlens) > 0
    logprobs, anchor = terms.logprobs.double(), terms.anchor.double()
    u = sequence_log_ratio(logprobs, anchor, terms.scope, cu_seqlens=terms.cu_seqlens)[active]
    length = tokens_of_rows(terms.scope, terms.cu_seqlens)[active]
    return StepSums(
        u=float(u.sum()),
        u_squared=float((u**2).sum()),
        sequences=float(active.sum()),
        generated=float(length.sum()),
    )
