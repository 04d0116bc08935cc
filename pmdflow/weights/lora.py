"""Published low-rank adapters: how they are known, and what they make of weights that are to have none beside them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pmdflow.errors import PmdflowError

DOWN = ".lora_A.weight"
"""Ends the name of a published matrix A [rank, inputs]; before it is the adapted layer's name."""
UP = ".lora_B.weight"
"""Ends the name of a published matrix B [outputs, rank], its scale included."""


def merged(adapters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `state` with published adapters added to them, in float32 before they are rounded.

    Example:
        >>> merged({"q.lora_A.weight": a, "q.lora_B.weight": b}, {"q.weight": base})["q.weight"]  # base + b @ a

    Raises:
        PmdflowError: an adapter is of a layer that is not there.
    """
    whole = dict(state)
    for layer in sorted(adapted_layers(adapters)):
        name = f"{layer}.weight"
        if name not in state:
            raise PmdflowError(f"there are adapters of {layer}, which the model does not have")
        own = state[name].detach()
        update = adapters[layer + UP].to(own.device).float() @ adapters[layer + DOWN].to(own.device).float()
        whole[name] = (own.float() + update).to(own.dtype)
    return whole


def has_adapters(weights: Mapping[str, Tensor]) -> bool:
    """Whether a publication is of adapters, not of whole weights."""
    return any(name.endswith(DOWN) for name in weights)


def adapted_layers(adapters: Mapping[str, Tensor]) -> set[str]:
    """Names of the layers that they are of."""
    return {name.removesuffix(DOWN) for name in adapters if name.endswith(DOWN)}


def rank_of(adapters: Mapping[str, Tensor]) -> int:
    """The rank that they all have."""
    return next(len(tensor) for name, tensor in adapters.items() if name.endswith(DOWN))
