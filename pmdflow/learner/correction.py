"""Importance weights between the engine that generated and the learner. Constants: no gradient passes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pmdflow.learner.layout import masked, rows, token_mean, unpack

LOG_RATIO_BOUND = 20.0
"""Log-ratios are cut here before the exponential. Source: verl's rollout correction."""
VETO_RATIO = 1e-4
"""A token this much less likely under the learner than under the engine condemns its sequence."""


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    cap: float = 2.0,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Truncated importance weights min(exp(clip(log rho, -20, 20)), cap), 0 where the mask is 0.

    Args:
        old_logprobs: The learner's log-probs, `[B, T]` or `[T]`.
        behavior_logprobs: The engine's log-probs.
        mask: Trained tokens.
        level: `token`: rho of each token; `sequence`: the product over the masked tokens, repeated at each of them.
        cap: Upper bound, positive.
        normalize: Scale to mean 1 after truncation, over tokens or over sequences as `level` says.
        cu_seqlens: Start of each sequence and the end [B + 1], for packed tensors.

    Returns:
        Weights of the shape of `old_logprobs`.

    Raises:
        ValueError: cap is not positive, the level is unknown, or shapes differ.

    Source: verl, rollout correction.
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}; it must be positive")
    chosen = mask.bool()
    log_ratio = masked(chosen, old_logprobs - behavior_logprobs)
    if level == "token":
        weights = masked(chosen, log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(max=cap))
        mean = weights.sum() / chosen.sum().clamp(min=1)
    elif level == "sequence":
        per_row, chosen_rows = rows(cu_seqlens, log_ratio, chosen)
        active = chosen_rows.any(1)
        ratio = per_row.sum(1).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(max=cap)
        mean = masked(active, ratio).sum() / active.sum().clamp(min=1)
        spread = ratio[:, None].expand_as(chosen_rows) if cu_seqlens is None else unpack(ratio, cu_seqlens)
        weights = masked(chosen, spread)
    else:
        raise ValueError(f"level is {level!r}; it must be 'token' or 'sequence'")
    return weights / torch.where(mean > 0, mean, torch.ones_like(mean)) if normalize else weights


@torch.no_grad()
def sequence_weights(weights: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """The mean of token weights over the masked tokens of each sequence `[B]`, as the losses take them."""
    values, chosen = rows(cu_seqlens, weights, mask.bool())
    return token_mean(chosen, values)


@torch.no_grad()
def veto(
    old_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    threshold: float = VETO_RATIO,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Which sequences hold a masked token whose ratio exp(old - behavior) is below `threshold`.

    Returns:
        bool [B]; True drops the sequence: its mask is emptied.

    Raises:
        ValueError: the threshold is not positive, or shapes differ.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it bounds a probability ratio: choose a positive value")
    old, behavior, chosen = rows(cu_seqlens, old_logprobs, behavior_logprobs, mask.bool())
    return (masked(chosen, old - behavior) < torch.tensor(threshold, dtype=old.dtype).log()).any(1)
