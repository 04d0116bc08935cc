"""Block-diagonal causal attention over sequences that lie one after another in a single row, windows included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from pmdflow.learner.context import Context
from pmdflow.learner.layers import attend, family_problems, window_of

ATTENTION = "pmdflow_packed"
"""Name of the attention function, for `attn_implementation`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Where the sequences of one row are."""

    lengths: tuple[int, ...]
    """Tokens of each sequence [B]; they add up to the row's."""
    cu_seqlens: Tensor
    """Start of each sequence and the end, int32 on the device [B + 1]."""
    position_ids: Tensor
    """Position of each token in its sequence [1, T]."""
    context: Context | None = None
    """The ranks that have a part of the row's tokens each; None: this one has them all."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device, context: Context | None = None) -> Packed:
        """Describe a row of sequences of `lengths` tokens."""
        ends = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        starts = ends.to(device, torch.int32)
        return cls(lengths=lengths, cu_seqlens=starts, position_ids=positions.to(device), context=context)

    def shared(self, context: Context) -> Packed:
        """The same row for several ranks, padded by a sequence of its own to as many tokens for each."""
        tokens = sum(self.lengths)
        padding = context.size * context.width(tokens) - tokens
        lengths = (*self.lengths, padding) if padding else self.lengths
        return Packed.of(lengths, self.position_ids.device, context)


def require_packable(model: Any, path: str) -> None:
    """Refuse a model whose layers do not keep apart what shares a row.

    Raises:
        ValueError: names what the model does and how to train it all the same.
    """
    problems = list(family_problems(model.config, model))
    if problems:
        raise ValueError(
            f"learner.packing: {path}, a {model.config.model_type}, has {', '.join(problems)}, sequences cannot share "
            "a row: set it to false"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence to itself: flash attention on a GPU, else SDPA sequence by sequence.

    Soft-capped scores and sinks are computed without either, in memory that grows with the square of a sequence. Ranks
    that share the row exchange their tokens' heads for all tokens of some heads, and back.

    Args:
        module: The attention layer.
        query: [1, G * H, T, D].
        key: [1, H, T, D].
        value: [1, H, T, D].
        attention_mask: None; transformers makes no mask for an attention function of ours.
        packed: The sequences; None means that every row is one sequence, without padding. Where ranks share the row, T
            is this one's part of its tokens.
        scaling: Factor of the scores; None is D ** -0.5.
        sliding_window: Tokens that a token sees, itself included; None is all before it.
        softcap: Scores stay between this and its negative.
        s_aux: The sink of each query head [G * H].
        kwargs: What transformers passes to attention functions.

    Returns:
        Output [1, T, G * H, D], and None.
    """
    window = window_of(module, sliding_window)
    context = None if packed is None else packed.context
    if context is not None:
        query, key, value = (context.heads_of(tensor) for tensor in (query, key, value))
        s_aux = None if s_aux is None else context.part(s_aux)
    output = _attended(query, key, value, packed, scaling=scaling, window=window, softcap=softcap, sinks=s_aux)
    return (output if context is None else context.tokens_of(output)), None


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed | None,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Of each sequence to itself; output [1, T, G * H, D]."""
    plain = softcap is None and sinks is None
    if packed is not None and plain and query.is_cuda and query.dtype != torch.float32:
        return _flash(query, key, value, packed, scaling=scaling, window=window)
    lengths = (query.shape[2],) if packed is None else packed.lengths
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    parts = [
        attend(q, k, v, mask=_window_mask(q, window), scaling=scaling, softcap=softcap, sinks=sinks)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()  # some families view it


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """What each token of a sequence sees, bool [1, 1, L, L]; None if that is all before it."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return seen.triu(1 - window)[None, None]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, *, scaling: float | None, window: int | None
) -> Tensor:
    longest = max(packed.lengths)
    queries, keys, values = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        queries,
        keys,
        values,
        packed.cu_seqlens,
        packed.cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # keys to the left, the token itself not counted
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), "varlen_attn returns a tuple only for return_aux"
    return output[None]


AttentionInterface.register(ATTENTION, packed_attention)
