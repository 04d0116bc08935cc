"""Losses of policy optimization. Torch, pure functions, to be minimised.

Every tensor with one value a token is padded `[B, T]`, or packed `[T]` with `cu_seqlens [B + 1]`; packed input is
laid out as rows first, so both forms share one computation. Values outside the mask are never read: they may be
-inf or NaN. A sequence without a trained token leaves the batch mean; if none has one, the loss is 0 and so is its
gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pmdflow.learner.correction import LOG_RATIO_BOUND
from pmdflow.learner.correction import importance_weights as importance_weights
from pmdflow.learner.correction import sequence_weights as sequence_weights
from pmdflow.learner.correction import veto as veto
from pmdflow.learner.layout import column, masked, rows, sequence_mean, token_mean

Aggregation = Literal["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
Ratio = Literal["token", "token-both-sides", "prefix", "sequence"]
"""What an algorithm clips: token ratios, the same whatever the sign of A, their cumulative product, or their mean."""


def _pessimistic(log_ratio: Tensor, advantages: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """min(rho A, clip(rho) A), written so that no unused branch overflows; `low` and `high` bound log rho."""
    bound = torch.full_like(log_ratio, LOG_RATIO_BOUND)
    low_bound = torch.as_tensor(low, dtype=log_ratio.dtype, device=log_ratio.device)
    high_bound = torch.as_tensor(high, dtype=log_ratio.dtype, device=log_ratio.device)
    raised = torch.exp(torch.clamp(log_ratio, max=high_bound.expand_as(log_ratio)))
    lowered = torch.exp(torch.clamp(log_ratio, min=low_bound.expand_as(log_ratio), max=bound))
    return torch.where(advantages >= 0, raised, lowered) * advantages


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def sequence_log_ratio(logprobs: Tensor, anchor: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """u [B]: the sum over `mask` of log pi_theta - log pi_i, the log-ratio of each sequence."""
    lp, anchor, chosen = rows(cu_seqlens, logprobs, anchor, mask.bool())
    return masked(chosen, lp - anchor).sum(1)


def pmd_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    tau: float,
    aggregation: Aggregation = "seq-mean-token-mean",
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    generated_mask: Tensor | None = None,
    norm_length: float | None = None,
) -> Tensor:
    """Policy mirror descent: mean_i w_i (tau / 2) (A_i / tau - u_i)^2 / L_i.

    u_i and L_i = max(count, 1) run over the generated tokens; the gradient passes only through `mask`. So a
    trajectory of which only the end is trained keeps its full sequence log-ratio and its weight for each token. The
    gradient at a trained token is -w_i (A_i - tau u_i) / (B L_i), B = sequences with a trained token.

    Args:
        logprobs: log pi_theta of each token, `[B, T]` or `[T]`.
        reference_logprobs: log pi_i of each token, constants.
        advantages: A [B].
        mask: Trained tokens; a subset of `generated_mask`.
        tau: KL regularization, positive.
        aggregation: `seq-mean-token-sum` drops 1 / L_i; `seq-mean-token-sum-norm` divides by `norm_length` instead.
        weights: w [B], default 1; they never change the denominator. See `sequence_weights` for those of tokens.
        cu_seqlens: Start of each sequence and the end [B + 1]; its presence means packed tensors.
        generated_mask: Every token that the policy generated; default `mask`.
        norm_length: Divisor of `seq-mean-token-sum-norm`; None is the padded width.

    Returns:
        A scalar.

    Raises:
        ValueError: tau or norm_length is not positive, norm_length is missing for packed tensors, or shapes differ.

    Source: arXiv:2501.12599 eq. 3; OpenKimi `opmd`.
    """
    _require(tau > 0, f"tau is {tau}; it must be positive")
    norm_length = _norm_length(logprobs, cu_seqlens, aggregation, norm_length)
    generated = mask if generated_mask is None else generated_mask
    lp, anchor, trained, gen = rows(cu_seqlens, logprobs, reference_logprobs, mask.bool(), generated.bool())
    active = trained.any(1)
    used = torch.where(trained, lp, lp.detach())
    u = masked(active, masked(gen, used - anchor.detach()).sum(1))
    per_sequence = (column(active, advantages, lp) - tau * u) ** 2 / (2 * tau)
    if weights is not None:
        per_sequence = per_sequence * column(active, weights, lp)
    return sequence_mean(active, _by_length(per_sequence, gen, aggregation, norm_length))


def pmd_token_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    token_advantages: Tensor,
    mask: Tensor,
    *,
    tau: float,
    aggregation: Aggregation = "seq-mean-token-mean",
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    generated_mask: Tensor | None = None,
    norm_length: float | None = None,
) -> Tensor:
    """Policy mirror descent on credit for each token: mean_i w_i (tau / 2 u_i^2 - sum_t A_it log pi_theta) / L_i.

    The gradient at a trained token is -w_i (A_it - tau u_i) / (B L_i): with A_it = A_i that of `pmd_loss`, whose value
    differs by a constant. The pull towards pi_i stays one of whole sequences. With credit that is not constant the
    fixed point is no longer the Boltzmann policy of one reward.

    Args, Returns and Raises are those of `pmd_loss`, but for `token_advantages`: A of each token, of the shape of
    `logprobs`; values outside of `mask` are never read.

    Source: derived from arXiv:2501.12599 eq. 3.
    """
    _require(tau > 0, f"tau is {tau}; it must be positive")
    norm_length = _norm_length(logprobs, cu_seqlens, aggregation, norm_length)
    generated = mask if generated_mask is None else generated_mask
    lp, anchor, credit, trained, gen = rows(
        cu_seqlens, logprobs, reference_logprobs, token_advantages, mask.bool(), generated.bool()
    )
    active = trained.any(1)
    used = torch.where(trained, lp, lp.detach())
    u = masked(active, masked(gen, used - anchor.detach()).sum(1))
    # Not A * lp under the mask, but the product of what the mask selects: both may be NaN outside.
    earned = (masked(trained, credit.detach().to(lp.dtype)) * masked(trained, lp)).sum(1)
    per_sequence = tau / 2 * u**2 - earned
    if weights is not None:
        per_sequence = per_sequence * column(active, weights, lp)
    return sequence_mean(active, _by_length(per_sequence, gen, aggregation, norm_length))


def _norm_length(
    logprobs: Tensor, cu_seqlens: Tensor | None, aggregation: Aggregation, norm_length: float | None
) -> float | None:
    if aggregation == "seq-mean-token-sum-norm" and norm_length is None:
        _require(cu_seqlens is None, "packed tensors have no padded width: pass norm_length, for example max_tokens")
        return logprobs.shape[1]
    return norm_length


def _by_length(per_sequence: Tensor, generated: Tensor, aggregation: Aggregation, norm_length: float | None) -> Tensor:
    """Sequence losses [B] over what the aggregation divides by."""
    if aggregation == "seq-mean-token-mean":
        return per_sequence / generated.sum(1).clamp(min=1)
    if aggregation == "seq-mean-token-sum-norm":
        if norm_length is None or not norm_length > 0:
            raise ValueError(f"norm_length is {norm_length}; it must be positive")
        return per_sequence / norm_length
    _require(aggregation == "seq-mean-token-sum", f"aggregation {aggregation!r} is not known")
    return per_sequence


def pmd_squared(rewards_minus_baseline: Tensor, u: Tensor, *, tau: float) -> Tensor:
    """mean (r - b - tau u)^2 over sequences.

    Args:
        rewards_minus_baseline: r - b [B].
        u: Sequence log-ratios [B].
        tau: KL regularization.

    Source: arXiv:2507.20534 sec. 3.2.
    """
    residual = rewards_minus_baseline.to(u.dtype) - tau * u
    return (residual**2).sum() / max(residual.numel(), 1)


def token_pmd_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    alpha: float,
    beta: float,
    tau: float,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """-(1 / N) sum [clip(rho, e^alpha, e^beta) A - tau (log rho)^2] over the N trained tokens of the batch.

    Outside the band the first term has no gradient, whatever the sign of A; the second always pulls back.

    Args:
        logprobs: log pi_theta of each token, `[B, T]` or `[T]`.
        reference_logprobs: log pi_i of each token, constants.
        advantages: A [B].
        mask: Trained tokens.
        alpha: Lower bound of log rho, negative.
        beta: Upper bound of log rho, positive.
        tau: Weight of the pull back, not negative.
        weights: One factor a sequence [B], default 1; they never change the denominator.
        cu_seqlens: Start of each sequence and the end [B + 1], for packed tensors.

    Raises:
        ValueError: not alpha < 0 < beta, or tau is negative.

    Source: arXiv:2602.02276 eq. 1.
    """
    _require(alpha < 0 < beta, f"alpha is {alpha} and beta {beta}; they bound the log-ratio: alpha < 0 < beta")
    _require(tau >= 0, f"tau is {tau}; it must not be negative")
    lp, anchor, trained = rows(cu_seqlens, logprobs, reference_logprobs, mask.bool())
    active = trained.any(1)
    adv = column(active, advantages, lp)
    log_ratio = masked(trained, lp - anchor.detach())
    # The logarithm is cut, not the ratio: the value is the same and nothing overflows.
    per_token = torch.exp(log_ratio.clamp(alpha, beta)) * adv[:, None] - tau * log_ratio**2
    if weights is not None:
        per_token = per_token * column(active, weights, lp)[:, None]
    return -masked(trained, per_token).sum() / trained.sum().clamp(min=1)


def ctpo_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Clipped cumulative token ratios: rho_t = exp(sum over s <= t of log pi_theta - log behavior).

    The band is [e^(-eps_low sqrt t), e^(eps_high sqrt t)], t the 1-based number of the trained token; min(rho A,
    clip(rho) A), mean over tokens, then over sequences. The gradient passes through the whole prefix.

    Source: arXiv:2605.07331.
    """
    _require(eps_low > 0 and eps_high > 0, f"eps_low is {eps_low} and eps_high {eps_high}; both must be positive")
    lp, anchor, trained = rows(cu_seqlens, logprobs, behavior_logprobs, mask.bool())
    active = trained.any(1)
    adv = column(active, advantages, lp)[:, None]
    log_ratio = masked(trained, lp - anchor.detach()).cumsum(1)
    root = trained.cumsum(1).to(lp.dtype).sqrt()
    objective = _pessimistic(log_ratio, adv, -eps_low * root, eps_high * root)
    return -sequence_mean(active, token_mean(trained, objective))


def weighted_sft_loss(logprobs: Tensor, mask: Tensor, weights: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """-mean_i w_i mean_t log pi_theta: supervised learning on weighted samples; `weights` [B].

    Source: arXiv:2605.02469.
    """
    lp, trained = rows(cu_seqlens, logprobs, mask.bool())
    active = trained.any(1)
    return -sequence_mean(active, column(active, weights, lp) * token_mean(trained, lp))


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Clipped token ratios: min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), mean over tokens, then sequences.

    Source: arXiv:2402.03300 eq. 3, without its KL term.
    """
    _require(0 < eps_low < 1 and eps_high > 0, f"eps_low is {eps_low} and eps_high {eps_high}; need 0 < eps_low < 1")
    lp, anchor, trained = rows(cu_seqlens, logprobs, old_logprobs, mask.bool())
    active = trained.any(1)
    adv = column(active, advantages, lp)[:, None]
    log_ratio = masked(trained, lp - anchor.detach())
    objective = _pessimistic(log_ratio, adv, math.log1p(-eps_low), math.log1p(eps_high))
    return -sequence_mean(active, token_mean(trained, objective))


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Clipped sequence ratios s = exp(mean_t log rho_t): min(s A, clip(s, 1 - eps_low, 1 + eps_high) A), mean.

    Source: arXiv:2507.18071 eq. 5; default band from its section 5.1.
    """
    _require(0 < eps_low < 1 and eps_high > 0, f"eps_low is {eps_low} and eps_high {eps_high}; need 0 < eps_low < 1")
    lp, anchor, trained = rows(cu_seqlens, logprobs, old_logprobs, mask.bool())
    active = trained.any(1)
    log_ratio = token_mean(trained, lp - anchor.detach())
    adv = column(active, advantages, lp)
    return -sequence_mean(active, _pessimistic(log_ratio, adv, math.log1p(-eps_low), math.log1p(eps_high)))


@torch.no_grad()
def clipped_tokens(
    logprobs: Tensor,
    anchor: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio: Ratio,
    low: float,
    high: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """How many trained tokens have a clipped objective, a scalar count.

    Args:
        logprobs: log pi_theta of each token, `[B, T]` or `[T]`.
        anchor: What the ratio is taken to.
        advantages: A [B]; only the side that min(rho A, clip(rho) A) cuts counts, unless `ratio` has both sides.
        mask: Trained tokens.
        ratio: What is clipped.
        low: Lower bound of the log-ratio, negative; of a prefix it grows with the root of its length.
        high: Upper bound, likewise.
        cu_seqlens: Start of each sequence and the end [B + 1], for packed tensors.
    """
    lp, anchor, trained = rows(cu_seqlens, logprobs, anchor, mask.bool())
    log_ratio, scale = masked(trained, lp - anchor), torch.ones_like(lp)
    if ratio == "prefix":
        log_ratio, scale = log_ratio.cumsum(1), trained.cumsum(1).to(lp.dtype).sqrt()
    elif ratio == "sequence":
        log_ratio = token_mean(trained, log_ratio)[:, None].expand_as(lp)
    below, above = log_ratio < low * scale, log_ratio > high * scale
    rising = column(trained.any(1), advantages, lp)[:, None] >= 0
    cut = below | above if ratio == "token-both-sides" else torch.where(rising, above, below)
    return (cut & trained).sum()
