"""Padded and packed tensors brought to one form, and selection that never reads what is masked."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor


def rows(cu_seqlens: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Lay packed `[T]` tensors out as `[B, width]`, right-padded with 0; padded ones pass through.

    Half-precision values become float32: a sum over thousands of tokens needs it.

    Args:
        cu_seqlens: Start of each sequence and the end [B + 1]; None means that the tensors are padded.
        tensors: All `[B, T]`, or all `[T]`.

    Raises:
        ValueError: a shape fits neither form.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    tensors = tuple(tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor for tensor in tensors)
    if cu_seqlens is None:
        if any(len(shape) != 2 or shape != shapes[0] for shape in shapes):
            raise ValueError(f"padded tensors must share one shape [B, T], got {shapes}: pass cu_seqlens if packed")
        return list(tensors)
    cu = cu_seqlens.to(tensors[0].device, torch.int64)
    total = int(cu[-1])
    if any(shape != (total,) for shape in shapes):
        raise ValueError(
            f"packed tensors must have shape ({total},) because cu_seqlens ends with {total}, got {shapes}"
        )
    lengths = cu.diff()
    width = int(lengths.max()) if len(lengths) else 0
    offsets = torch.arange(width, device=cu.device)
    index = torch.where(offsets < lengths[:, None], cu[:-1, None] + offsets, total)
    return [torch.cat([tensor, tensor.new_zeros(1)])[index] for tensor in tensors]


def unpack(per_sequence: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Repeat one value a sequence `[B]` over its packed tokens `[T]`."""
    return per_sequence.repeat_interleave(cu_seqlens.to(per_sequence.device).diff())


def masked(mask: Tensor, values: Tensor) -> Tensor:
    """`values` where the mask is set, else 0; what lies outside may be -inf or NaN."""
    return torch.where(mask, values, torch.zeros_like(values))


def column(active: Tensor, values: ArrayLike, like: Tensor) -> Tensor:
    """One value a sequence `[B]` in the type of `like`, 0 where the sequence is not active."""
    given = torch.as_tensor(values)
    if given.shape != active.shape:
        raise ValueError(f"expected one value for each of {len(active)} sequences, got shape {tuple(given.shape)}")
    return masked(active, given.to(like.device, like.dtype))


def sequence_mean(active: Tensor, per_sequence: Tensor) -> Tensor:
    """The mean over active sequences; 0 if there is none."""
    return masked(active, per_sequence).sum() / active.sum().clamp(min=1)


def token_mean(mask: Tensor, per_token: Tensor) -> Tensor:
    """The mean over the masked tokens of each row `[B]`; 0 for a row without one."""
    return masked(mask, per_token).sum(1) / mask.sum(1).clamp(min=1)
