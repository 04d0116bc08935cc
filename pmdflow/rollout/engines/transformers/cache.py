"""The key and value cache of the transformers engine: one slot a sequence, batches of any mixture of lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from pmdflow.learner.layers import attend, window_of

ATTENTION = "pmdflow_slots"
"""Name of the attention function, for `attn_implementation`."""

_CAPACITY_STEP = 64


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    slot_groups: Sequence[tuple[int, int, int]] | None = None,
    window_masks: Mapping[int, Tensor] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """SDPA that reads little more of the cache than it must when decoding.

    With one query position, the query heads [B, G * H, 1, D] that share a key head become G positions of it
    [B, H, G, D], instead of the G copies of keys and values that SDPA may make under a mask.

    Args:
        module: The attention layer.
        query: [B, G * H, Q, D].
        key: [B, H, L, D].
        value: [B, H, L, D].
        attention_mask: Additive [B, 1, Q, L].
        slot_groups: `(first row, last row + 1, visible length)`, covering the batch; each reads only its own length.
        window_masks: The mask of each sliding window that the model has.
        scaling: Factor of the scores; None is D ** -0.5.
        sliding_window: Tokens that a token sees, itself included; None is all before it.
        softcap: Scores stay between this and its negative.
        s_aux: The sink of each query head [G * H].
        kwargs: What transformers passes to attention functions.

    Returns:
        Output [B, Q, G * H, D], and None.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    window = window_of(module, sliding_window)
    mask = attention_mask if window is None else (window_masks or {})[window]
    plain = softcap is None and s_aux is None
    if slot_groups is None or num_queries > 1:
        slot_groups = [(0, batch, key.shape[2])]
    elif plain:
        query = query.reshape(batch, key.shape[1], -1, head_dim)
    parts = []
    for first, end, length in slot_groups:
        keys, values = key[first:end, :, :length], value[first:end, :, :length]
        shown = mask[first:end, :, :, :length]
        parts.append(attend(query[first:end], keys, values, mask=shown, scaling=scaling, softcap=softcap, sinks=s_aux))
    output = torch.cat(parts)
    if num_queries == 1:
        return output.reshape(batch, 1, num_heads, -1), None
    return output.transpose(1, 2).contiguous(), None  # some families view it


AttentionInterface.register(ATTENTION, slot_attention)


class SlotCache(Cache):
    """Keys and values of all slots, a pair [slots, heads, capacity, head_dim] for each layer."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(layers=[])
        self._num_slots = num_slots
        self._capacity = 0
        self._pairs: list[list[Tensor]] = []
        self._write: tuple[Tensor, slice, Tensor]
        self._read: tuple[slice | Tensor, slice, slice] | None

    def aim(self, *, rows: Tensor, positions: Tensor, length: int, read: Literal["new", "rows", "first"]) -> None:
        """Choose where the next forward pass writes and what it sees.

        Args:
            rows: Slot of each batch row [B].
            positions: Where each new key goes [B, Q].
            length: Positions that are visible; the capacity grows to hold them.
            read: `new` shows only the new keys, `rows` those slots (a copy), `first` slots 0 to B - 1 (a view).
        """
        if length > self._capacity:
            self._grow(max(length, self._capacity * 3 // 2))
        self._write = (rows[:, None], slice(None), positions)
        chosen = slice(0, len(rows)) if read == "first" else rows
        self._read = None if read == "new" else (chosen, slice(None), slice(0, length))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, heads, Q, head_dim] and return the visible ones."""
        if layer_idx == len(self._pairs):
            self._pairs.append([self._zeros(key_states), self._zeros(value_states)])
        keys, values = self._pairs[layer_idx]
        keys[self._write] = key_states.transpose(1, 2)
        values[self._write] = value_states.transpose(1, 2)
        if self._read is None:
            return key_states, value_states
        return keys[self._read], values[self._read]

    def move(self, *, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of slots `sources` to slots `targets`; they may overlap."""
        for pair in self._pairs:
            for tensor in pair:
                at = torch.tensor([sources, targets], device=tensor.device)
                tensor[at[1], :, :length] = tensor[at[0], :, :length]

    def _zeros(self, like: Tensor) -> Tensor:
        # Zeros and not garbage: a masked NaN would still poison the attention's weighted sum.
        return like.new_zeros(self._num_slots, like.shape[1], self._capacity, like.shape[3])

    def _grow(self, capacity: int) -> None:
        self._capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        for pair in self._pairs:
            for index, old in enumerate(pair):
                pair[index] = self._zeros(old)
                pair[index][:, :, : old.shape[2]] = old
