"""What the attention layers of a model family do beyond plain causal attention, for the learner and the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_KINDS = {"full_attention", "sliding_attention"}
"""Layers that our attention functions compute; others keep a state, compress keys, or look at chunks."""


def family_problems(config: Any, family: Any) -> Iterator[str]:
    """What makes a model's sequences impossible to pack, or to cache in slots, by its configuration and class."""
    if getattr(family, "_is_stateful", False):
        yield "a recurrent state"
        return
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _KINDS
    yield from (f"layers of {kind}" for kind in sorted(kinds))
    if not getattr(family, "_supports_attention_backend", False):
        yield "attention that cannot be replaced"


def windows(config: Any) -> frozenset[int]:
    """The sliding windows of a model's layers, in tokens; empty if every layer sees all."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    return frozenset([window] if window and (not kinds or "sliding_attention" in kinds) else [])


def has_soft_cap(config: Any) -> bool:
    """Whether a model's attention scores are capped."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def heads(config: Any) -> list[tuple[int, int]]:
    """Attention heads of each layer, and their size; layers of a family need not be alike."""
    found = []
    for layer in config.get_text_config().per_layer_config:
        number = getattr(layer, "num_attention_heads", 0)  # a recurrent family may have none
        found.append((number, getattr(layer, "head_dim", None) or layer.hidden_size // max(number, 1)))
    return found


def window_of(module: Any, given: int | None) -> int | None:
    """The sliding window of an attention layer; None if it sees all.

    Some families keep their windows in the mask only, which a function of ours does not get: they are told by this.

    Args:
        module: The layer.
        given: What it passes as `sliding_window`.

    Raises:
        ValueError: the layer passes another window than its configuration says.
    """
    given = given or None
    config = module.config
    kinds = getattr(config, "layer_types", None)
    expected: int | None = next(iter(windows(config)), None)
    if kinds and kinds[module.layer_idx] != "sliding_attention":
        expected = None
    if given != expected:
        raise ValueError(
            f"layer {module.layer_idx} of a {config.model_type} passes a window of {given}, its configuration says "
            f"{expected}; set learner.packing to false and rollout.engine to vllm, or choose another model"
        )
    return given


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with soft-capped scores and sinks, which fused functions do not have; its memory grows with Q x L.

    Args:
        query: [B, G * H, Q, D].
        key: [B, H, L, D].
        value: [B, H, L, D].
        mask: Additive or bool [B or 1, 1, Q, L]; None is causal.
        scaling: Factor of the scores; None is D ** -0.5.
        softcap: Scores stay between this and its negative.
        sinks: A score that takes probability and gives nothing, for each query head [G * H].

    Returns:
        [B, G * H, Q, D].
    """
    if softcap is None and sinks is None:
        grouped = query.shape[1] != key.shape[1]
        if grouped and mask is not None:  # with both, a GPU would fall back to its slowest kernel
            copies = query.shape[1] // key.shape[1]
            key, value, grouped = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1), False
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    heads, width = key.shape[1], key.shape[2]
    folded = query.unflatten(1, (heads, -1))
    scores = (folded @ key[:, :, None].transpose(-1, -2)).float() * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(query.shape[2], width, dtype=torch.bool, device=query.device).tril()[None, None]
    hidden = ~mask if mask.dtype == torch.bool else mask < 0
    scores = scores.masked_fill(hidden[:, :, None], -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = scores.softmax(-1)[..., :width].to(value.dtype)
    output: Tensor = probs @ value[:, :, None]
    return output.flatten(1, 2)
