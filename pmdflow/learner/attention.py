"""Block-diagonal causal attention over sequences that lie one after another in a single row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

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

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Packed:
        """Describe a row of sequences of `lengths` tokens."""
        ends = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return cls(lengths=lengths, cu_seqlens=ends.to(device, torch.int32), position_ids=positions.to(device))


def require_packable(model: Any, path: str) -> None:
    """Refuse a model whose layers are more than plain causal attention.

    Raises:
        ValueError: names what the model does and how to train it all the same.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    problems = [
        *sorted(kinds),
        *(["a sliding window"] if getattr(config, "sliding_window", None) is not None else []),
        *(["soft-capped scores"] if getattr(config, "attn_logit_softcapping", None) is not None else []),
        *([] if model._supports_attention_backend else ["attention that cannot be replaced"]),
    ]
    if problems:
        raise ValueError(
            f"learner.packing: {path} has {', '.join(problems)}, sequences cannot share a row: set it to false"
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence to itself: flash attention on a GPU, else SDPA sequence by sequence.

    Args:
        module: The attention layer.
        query: [1, G * H, T, D].
        key: [1, H, T, D].
        value: [1, H, T, D].
        attention_mask: None; transformers makes no mask for an attention function of ours.
        packed: The sequences; None means that every row is one sequence, without padding.
        scaling: Factor of the scores; None is D ** -0.5.
        kwargs: What transformers passes to attention functions.

    Returns:
        Output [1, T, G * H, D], and None.
    """
    grouped = query.shape[1] != key.shape[1]
    if packed is None:
        whole = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        return whole.transpose(1, 2), None
    if query.is_cuda and query.dtype != torch.float32:
        return _flash(query, key, value, packed, scaling=scaling, grouped=grouped), None
    queries, keys, values = (tensor.split(packed.lengths, dim=2) for tensor in (query, key, value))
    parts = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, *, scaling: float | None, grouped: bool
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
        window_size=(-1, 0),
        enable_gqa=grouped,
    )
    assert isinstance(output, Tensor), "varlen_attn returns a tuple only for return_aux"
    return output[None]


AttentionInterface.register(ATTENTION, packed_attention)
