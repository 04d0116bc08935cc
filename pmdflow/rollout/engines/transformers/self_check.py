"""The transformers engine's self-check at start: cached chunks and steps score as the plain model does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmdflow.learner.agreement import failures_named, plain_scores, probe_tokens, require_agreement, scores_of
from pmdflow.rollout.engines.transformers.batch import DecodeBatch
from pmdflow.rollout.engines.transformers.slots import HeldSequence

_STEPS = 2
"""Decode steps after the prefill."""


@torch.inference_mode()
def check_cached(cached: Any, model: Any, *, num_slots: int) -> None:
    """Refuse a model that scores otherwise with the cache, alone or in company.

    Args:
        cached: The `CachedModel`; slots 0 and 1 are overwritten.
        model: Its model.
        num_slots: Slots that it has; with one, sequences have no company.

    Raises:
        ValueError: names the family and the difference.
    """
    remedy = "set rollout.engine to vllm, or choose another model"
    sequences = probe_tokens(model)
    with failures_named(model, what="the transformers engine", remedy=remedy):
        plain = plain_scores(model, sequences)
        for name, count in (("alone", 1), ("in company", 2))[:num_slots]:
            got = _scores(cached, sequences[:count])
            expected = torch.cat([scores[-_STEPS:] for scores in plain[:count]])
            what = f"the transformers engine ({name})"
            require_agreement(got, expected, what=what, model=model, remedy=remedy)


def _scores(cached: Any, sequences: list[list[int]]) -> Tensor:
    """Log-probs of the last tokens of each, which take the first slots; the longest is first."""
    starts = [len(tokens) - 1 - _STEPS for tokens in sequences]
    slots = list(range(len(sequences)))
    for first in (True, False):  # in two chunks, as after a new turn
        halves = [start // 2 for start in starts]
        spans = [(0, half) if first else (half, start) for half, start in zip(halves, starts, strict=True)]
        chunks = [tokens[begin:end] for tokens, (begin, end) in zip(sequences, spans, strict=True)]
        cached.prefill(chunks, slots=slots, starts=[begin for begin, _ in spans])
    steps = []
    for step in range(_STEPS):
        held = [
            HeldSequence(
                id=slot, tokens=tokens[: start + step + 1], limit=1, remaining=1, temperature=1.0, top_p=1.0,
                slot=slot, cached=start + step,
            )
            for slot, tokens, start in zip(slots, sequences, starts, strict=True)
        ]  # fmt: skip
        group = (0, len(held), max(sequence.cached + 1 for sequence in held))
        steps.append(cached.decode(DecodeBatch.of(held, [group], device=cached.device)))
    logits = torch.stack(steps, dim=1)
    return torch.cat([scores_of(row, tokens) for row, tokens in zip(logits, sequences, strict=True)])
