"""Published low-rank adapters on the receiving side: merged into the weights that they adapt."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

DOWN = ".lora_A.weight"
"""Ends the name of a published matrix A [rank, inputs]; before it is the adapted layer's name."""
UP = ".lora_B.weight"
"""Ends the name of a published matrix B [outputs, rank], its scale included."""


class AdapterMerger:
    """Turns published adapters into whole weights of a model whose own weights are those that were adapted.

    Example:
        >>> merger = AdapterMerger()
        >>> merger.merge({"q.lora_A.weight": a, "q.lora_B.weight": b}, {"q.weight": base})["q.weight"]  # base + b @ a
    """

    def __init__(self) -> None:
        self._base: dict[str, Tensor] = {}

    def merge(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The whole weights by the names of `state`; `weights` unchanged if they hold no adapter.

        Args:
            weights: As published.
            state: The model's own tensors, which the first adapter's are added to; later ones replace it.
        """
        if not any(name.endswith(DOWN) for name in weights):
            return weights
        merged = dict(state)
        for name, up in weights.items():
            if not name.endswith(UP):
                continue
            layer = name.removesuffix(UP)
            target = f"{layer}.weight"
            if target not in state:
                merged[target] = up  # The receiver refuses it by name.
                continue
            own = state[target].detach()
            base = self._base.setdefault(target, own.clone())
            update = up.to(own.device).float() @ weights[layer + DOWN].to(own.device).float()
            merged[target] = (base.float() + update).to(own.dtype)
        return merged
