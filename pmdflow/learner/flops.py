"""How fast the learner is, in tokens and as a share of what the device can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pmdflow.config.schema import Config
from pmdflow.learner.batch import StepPlan
from pmdflow.learner.layers import heads
from pmdflow.types import ClaimRows

PEAK_BFLOAT16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 floating-point operations a second, by a part of the device's name; the makers' data sheets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Floating-point operations of a causal language model, and the peak of the ranks' devices together.

    Example:
        >>> Speed(per_token=2e9, per_square=1e5, passes=4, peak=None).operations([512])
        4200857600.0
    """

    per_token: float
    """Of a forward pass for each token: 2 for every weight but the input embedding."""
    per_square: float
    """Of a forward pass for each (tokens of a sequence)^2: causal attention."""
    passes: int
    """Forward passes that one training pass costs: 3 for forward and backward, and 1 for the reference."""
    peak: float | None
    """Operations a second; None where the device is not known, and for float32."""

    @classmethod
    def of(cls, model: Any, *, config: Config, device: torch.device) -> Speed:
        """Count those of a Hugging Face model, at the learner's settings."""
        text = model.config.get_text_config()
        weights = sum(parameter.numel() for parameter in model.parameters())
        if not getattr(text, "tie_word_embeddings", False):
            weights -= model.get_input_embeddings().weight.numel()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((peak for part, peak in PEAK_BFLOAT16.items() if part in name), None)
        known = peak is not None and config.model.dtype == "bfloat16"
        return cls(
            per_token=2.0 * weights,
            # Scores and values, each 2 operations for every pair of tokens, of which half are seen.
            per_square=2.0 * sum(number * size for number, size in heads(text)),
            passes=4 if config.learner.anchor == "reference" else 3,
            peak=peak * config.learner.num_ranks if known and peak is not None else None,
        )

    @property
    def quadratic(self) -> float:
        """What a token of a sequence costs more for each token before it, relative to its own cost."""
        return self.per_square / self.per_token if self.per_token else 0.0

    def operations(self, lengths: Sequence[int] | np.ndarray[Any, Any]) -> float:
        """Operations of training on sequences of these lengths."""
        tokens = np.asarray(lengths, np.float64)
        return float(self.passes * (self.per_token * tokens.sum() + self.per_square * (tokens**2).sum()))

    def metrics(self, claim: ClaimRows, plans: Sequence[StepPlan], *, seconds: float) -> dict[str, Any]:
        """Tokens a second, prompt tokens counted, and the model FLOP utilization, None on unknown devices."""
        members = [index for plan in plans for rank in plan.ranks for micro in rank for index in micro]
        lengths = np.diff(claim.cu_seqlens)[members]
        used = None if self.peak is None else self.operations(lengths) / (seconds * self.peak)
        return {"learner/tokens_per_s": float(lengths.sum() / seconds), "learner/mfu": used}
