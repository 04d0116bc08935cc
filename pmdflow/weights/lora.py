"""Published low-rank adapters on the receiving side: merged into the weights that they adapt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file
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

    @property
    def kept(self) -> Iterable[Tensor]:
        """Weights without adapters, on the device of those that they were merged into."""
        return self._base.values()

    def merge(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The whole weights by the names of `state`; `weights` unchanged if they hold no adapter.

        Args:
            weights: As published.
            state: The model's own tensors, which the first adapter's are added to; later ones replace it.
        """
        if not has_adapters(weights):
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


def has_adapters(weights: Mapping[str, Tensor]) -> bool:
    """Whether a publication is of adapters, not of whole weights."""
    return any(name.endswith(DOWN) for name in weights)


def load_base(folder: str) -> dict[str, Tensor]:
    """The weights of a model folder, for receivers that do not have them by their published names.

    Raises:
        ValueError: the folder has no safetensors files.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors files to add adapters to; download the model to a folder")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
