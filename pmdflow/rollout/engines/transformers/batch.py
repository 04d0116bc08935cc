"""The sequences of one decode step as tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pmdflow.rollout.engines.transformers.slots import HeldSequence, SlotGroup


@dataclass(slots=True)
class DecodeBatch:
    """The sequences that decode together; batch row i is slot i. Tensors are [B] unless said."""

    sequences: list[HeldSequence]
    tokens: Tensor
    """Last token of each, the input of the next step."""
    positions: Tensor
    """Where that token stands."""
    slots: Tensor
    """0 to B - 1."""
    temperatures: Tensor
    """1 where greedy."""
    greedy: Tensor | None
    """None if no row is greedy."""
    top_p: Tensor | None
    """None if it is 1 everywhere."""
    excluded: Tensor | None
    """Row and id of each token that must not be drawn [2, E]; None if there is none."""
    groups: list[SlotGroup]
    """Rows of similar length, longest first; they cover the batch."""

    @classmethod
    def of(cls, sequences: list[HeldSequence], groups: list[SlotGroup], *, device: torch.device) -> DecodeBatch:
        """The batch of `sequences`, which are in slots 0 to B - 1 in this order."""

        def tensor(values: Iterable[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device)

        greedy = [s.temperature == 0 for s in sequences]
        return cls(
            sequences=sequences,
            tokens=tensor((s.tokens[-1] for s in sequences), torch.int64),
            positions=tensor((s.cached for s in sequences), torch.int64),
            slots=torch.arange(len(sequences), device=device),
            temperatures=tensor((s.temperature or 1.0 for s in sequences), torch.float32),
            greedy=tensor(greedy, torch.bool) if any(greedy) else None,
            top_p=tensor((s.top_p for s in sequences), torch.float32) if any(s.top_p < 1 for s in sequences) else None,
            excluded=_excluded(sequences, device),
            groups=groups,
        )

    def advance(self, tokens: Tensor) -> None:
        """Move on by the tokens that were drawn [B]."""
        self.tokens = tokens
        self.positions = self.positions + 1
        self.groups = [(first, end, length + 1) for first, end, length in self.groups]


def _excluded(sequences: list[HeldSequence], device: torch.device) -> Tensor | None:
    """Row and stop id of every sequence that must not end yet, [2, E]."""
    pairs = [(row, token) for row, s in enumerate(sequences) if s.min_tokens > 0 for token in s.stops]
    return torch.tensor(pairs, device=device).T if pairs else None
