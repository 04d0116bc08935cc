"""Log-probs and entropies of tokens from hidden states, without ever holding all logits.

The output head runs over chunks of positions, forward and again backward; the largest tensor is one chunk's logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_PER_CHUNK = 1 << 26
"""Float32 logits held at a time (256 MiB); the passes hold two or three such tensors."""


class TokenScores(NamedTuple):
    """What the policy says of each given token, in float32."""

    logprobs: Tensor
    """[P]"""
    entropies: Tensor
    """Entropy in nats of the distribution that the token was drawn from [P]."""
    flow: Tensor | None = None
    """First-order change of that entropy by a unit step along the gradient of the token's log-prob [P], no gradient."""
    top: Tensor | None = None
    """Ids of other tokens [P, K]: the likeliest, or those that were asked for."""
    top_logprobs: Tensor | None = None
    """Theirs [P, K], no gradient."""
    alternatives: Tensor | None = None
    """Log-probs of other tokens [P, K], with gradient."""


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor,
    alternatives: Tensor | None = None,
) -> TokenScores:
    """Score `targets` under softmax((hidden @ weight.T + bias) / temperature), both outputs with gradient.

    Memory beyond inputs and gradients is 2 to 3 times `LOGITS_PER_CHUNK` floats, whatever P is. The gradient of
    `weight` is accumulated in float32.

    Args:
        hidden: [P, H].
        weight: Output embeddings [V, H].
        bias: [V], or None.
        targets: Token ids [P].
        temperatures: float32 [P].
        alternatives: Ids of other tokens that are scored with them [P, K].
    """
    apply: Any = _TokenScores.apply
    ids = targets[:, None] if alternatives is None else torch.cat([targets[:, None], alternatives], dim=1)
    logprobs, entropies = apply(hidden, weight, bias, ids, temperatures)
    own = TokenScores(logprobs[:, 0].clone(), entropies)  # FSDP wants no views from a module
    return own if alternatives is None else own._replace(alternatives=logprobs[:, 1:].clone())


@torch.no_grad()
def entropy_flow(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperatures: Tensor) -> Tensor:
    """-[p_y (log p_y + H) - sum_k p_k^2 (log p_k + H)] of each target y [P], k over the vocabulary; as `token_scores`.

    dH / dz_k = -p_k (log p_k + H), and a step along the gradient of log p_y moves the logits by onehot(y) - p.

    Source: arXiv:2605.11491, in its exact form.
    """
    flow = hidden.new_empty((len(targets),), dtype=torch.float32)
    size = _chunk_size(weight)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = _scaled_logits(hidden[part], weight, bias, temperatures[part])
        flow[part] = _flow(logits.log_softmax(1), targets[part])
    return flow


@torch.no_grad()
def others(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperatures: Tensor, *, top: int, at: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids [P, K] and log-probs [P, K] of the `top` likeliest tokens at each position, or of those in `at` [P, K]."""
    size = _chunk_size(weight)
    parts = [slice(start, start + size) for start in range(0, max(len(hidden), 1), size)]
    found = [
        _others(
            _scaled_logits(hidden[part], weight, bias, temperatures[part]).log_softmax(1),
            top=top,
            at=None if at is None else at[part],
        )
        for part in parts
    ]
    return torch.cat([ids for ids, _ in found]), torch.cat([own for _, own in found])


def _others(logprobs: Tensor, *, top: int, at: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same from log-probs of all tokens [P, V]."""
    if at is None:
        own, ids = logprobs.topk(min(top, logprobs.shape[1]), dim=1)
        return ids, own
    return at, logprobs.gather(1, at)


def _flow(logprobs: Tensor, targets: Tensor) -> Tensor:
    probabilities = logprobs.exp()
    by_logit = -probabilities * (logprobs - (probabilities * logprobs).sum(1, keepdim=True))
    return by_logit.gather(1, targets[:, None]).squeeze(1) - (by_logit * probabilities).sum(1)


def scores_of_logits(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor,
    *,
    flow: bool = False,
    top: int = 0,
    at: Tensor | None = None,
    alternatives: Tensor | None = None,
) -> TokenScores:
    """The same from logits [P, V] that are there already, and what else is asked."""
    logprobs = (logits.float() / temperatures[:, None]).log_softmax(1)
    entropies = -(logprobs.exp() * logprobs).sum(1)
    ids, own = _others(logprobs.detach(), top=top, at=at) if top or at is not None else (None, None)
    return TokenScores(
        logprobs.gather(1, targets[:, None]).squeeze(1),
        entropies,
        flow=_flow(logprobs.detach(), targets) if flow else None,
        top=ids,
        top_logprobs=own,
        alternatives=None if alternatives is None else logprobs.gather(1, alternatives),
    )


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = _chunk_size(weight)
        entropies, normalizers = (hidden.new_empty((len(targets),), dtype=torch.float32) for _ in range(2))
        logprobs = hidden.new_empty(targets.shape, dtype=torch.float32)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            scaled = _scaled_logits(hidden[part], weight, bias, temperatures[part])
            normalizers[part] = scaled.logsumexp(1)
            scaled.sub_(normalizers[part, None])
            logprobs[part] = scaled.gather(1, targets[part])
            entropies[part] = scaled.exp().mul_(scaled).sum(1).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, normalizers, entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperatures, normalizers, entropies = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        if by_logprob is None:
            by_logprob = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        size = _chunk_size(weight)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logprobs = _scaled_logits(hidden[part], weight, bias, temperatures[part]).sub_(normalizers[part, None])
            gradient = _logit_gradient(
                logprobs,
                targets[part],
                by_logprob[part],
                None if by_entropy is None else by_entropy[part, None],
                entropies[part, None],
            )
            gradient = gradient.div_(temperatures[part, None]).to(weight.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part])
            if weight_grad is not None:
                _add_product(weight_grad, gradient, hidden[part])
            if bias_grad is not None:
                bias_grad += gradient.sum(0, dtype=torch.float32)
        return (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
            None,
            None,
        )


def _chunk_size(weight: Tensor) -> int:
    return max(1, LOGITS_PER_CHUNK // len(weight))


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperatures: Tensor) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float().div_(temperatures[:, None])


def _logit_gradient(
    logprobs: Tensor, targets: Tensor, by_logprob: Tensor, by_entropy: Tensor | None, entropies: Tensor
) -> Tensor:
    """Gradient by the scaled logits; overwrites `logprobs`.

    d log p_y / dz = onehot(y) - p, and dH / dz = -p (log p + H).
    """
    total = by_logprob.sum(1, keepdim=True)
    if by_entropy is None:
        gradient = logprobs.exp_().mul_(-total)
    else:
        probabilities = logprobs.exp()
        gradient = logprobs.add_(entropies).mul_(by_entropy).add_(total).mul_(probabilities).neg_()
    # A column of targets at a time reads and writes without a collision: deterministic, unlike scatter_add.
    for ids, own in zip(targets.split(1, dim=1), by_logprob.split(1, dim=1), strict=True):
        gradient.scatter_(1, ids, gradient.gather(1, ids) + own)
    return gradient


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient.T @ hidden, in float32."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    else:
        total.add_(gradient.T @ hidden)
