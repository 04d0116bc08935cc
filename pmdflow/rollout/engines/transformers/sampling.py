"""Drawing tokens from logits, with the log-probs that the learner expects."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    *,
    temperatures: Tensor,
    greedy: Tensor | None,
    top_p: Tensor | None,
    generator: torch.Generator,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: [B, V].
        temperatures: [B]; 1 where greedy.
        greedy: Rows that take the most likely token [B]; None if there is none.
        top_p: Probability mass that is kept [B]; None if it is 1 everywhere.
        generator: On the device of `logits`.
        excluded: Row and id of each token that is not drawn [2, E]; None if there is none.

    Returns:
        Tokens [B] and their log-probs under softmax(logits / temperature) over the whole vocabulary [B].
    """
    logprobs = torch.log_softmax(logits.float() / temperatures[:, None], dim=-1)
    probs = logprobs.exp()
    if excluded is not None:
        pairs = tuple(excluded)
        probs = probs.index_put(pairs, probs.new_zeros(()))
        logits = logits.index_put(pairs, logits.new_tensor(-torch.inf))
    if top_p is not None:
        ordered, index = probs.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p[:, None] * ordered.sum(-1, keepdim=True)] = 0
        probs = torch.zeros_like(probs).scatter_(1, index, ordered)
    # Inversion needs one random number a row; float64 so that a token of probability 0 is never drawn.
    cumulated = probs.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=generator)
    tokens = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).clamp_(max=probs.shape[1] - 1)
    if greedy is not None:
        tokens = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), tokens)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]
