"""Context parallelism: ranks that share their rows, each with a part of the tokens, and in attention of the heads.

Source: DeepSpeed Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from pmdflow.learner.layers import heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The ranks that compute the same rows, as this one sees them; neighbours by number."""

    group: Any
    """Their process group."""
    size: int
    rank: int
    """This one's number among them."""

    def width(self, tokens: int) -> int:
        """Tokens of a row that each of them has, padding included."""
        return -(-tokens // self.size)

    def heads_of(self, own: Tensor) -> Tensor:
        """All tokens of its part of the heads [1, H / N, N * T, D], from all heads of its tokens [1, H, T, D]."""
        blocks = own[0].unflatten(0, (self.size, -1))
        return _exchanged(blocks, self.group).transpose(0, 1).flatten(1, 2)[None]

    def tokens_of(self, own: Tensor) -> Tensor:
        """All heads of its tokens [1, T, H, D], from its part of the heads of all tokens [1, N * T, H / N, D]."""
        blocks = own[0].unflatten(0, (self.size, -1))
        return _exchanged(blocks, self.group).transpose(0, 1).flatten(1, 2)[None]

    def part(self, by_head: Tensor) -> Tensor:
        """This rank's part of what there is for each head [H]."""
        return by_head.chunk(self.size)[self.rank]

    def gathered(self, own: Tensor, at: Tensor) -> Tensor:
        """What all have, from what this rank has where `at` [P] is set; the gradient goes to whoever has it."""
        apply: Any = _Gather.apply
        whole: Tensor = apply(own, at, self.group)
        return whole


def make_contexts(size: int) -> tuple[Context, Any]:
    """The context of this rank, and the group of those that have other rows; every rank must call.

    Raises:
        ValueError: the ranks cannot be divided into groups of `size`.
    """
    ranks, own = dist.get_world_size(), dist.get_rank()
    if ranks % size:
        raise ValueError(
            f"learner.ranks ({ranks}) is not a multiple of learner.context_parallel ({size}): change one of them"
        )
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
    across = [dist.new_group(list(range(first, ranks, size))) for first in range(size)]
    return Context(group=groups[own // size], size=size, rank=own % size), across[own % size]


def require_folder_divisible(folder: Path, size: int) -> None:
    """`require_divisible` of the model in a folder."""
    require_divisible(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), size)


def require_divisible(config: Any, size: int) -> None:
    """Refuse a model whose heads cannot be dealt to `size` ranks.

    Raises:
        ValueError: names the layer's heads and what would divide them.
    """
    shared = getattr(config.get_text_config(), "num_key_value_heads", None)
    counts: Sequence[int] = [number for number, _ in heads(config)] + ([shared] if shared else [])
    odd = [number for number in counts if number % size]
    if odd:
        raise ValueError(
            f"learner.context_parallel is {size}, but a {config.model_type} with {odd[0]} heads (of queries, or of "
            f"keys and values) cannot be dealt to so many ranks; set it to a divisor of {odd[0]}"
        )


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(blocks, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, at: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(at)
        whole = own.new_zeros(len(at), *own.shape[1:])
        whole[at] = own
        dist.all_reduce(whole, group=group)  # each place is one rank's, the others add 0
        if not own.is_floating_point():
            ctx.mark_non_differentiable(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        return gradient[at], None, None


def _exchanged(blocks: Tensor, group: Any) -> Tensor:
    apply: Any = _Exchange.apply
    exchanged: Tensor = apply(blocks, group)
    return exchanged


def _all_to_all(blocks: Tensor, group: Any) -> Tensor:
    """Block i [N, ...] to rank i; the block of rank i in its place."""
    out = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, blocks.contiguous(), group=group)
    return out
