"""Low-rank adapters through peft in learner and engine, and the names under which they are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pmdflow.config.schema import LoraConfig
from pmdflow.weights.lora import DOWN, UP, adapted_layers, rank_of

_NAMES = {".lora_A.default.weight": DOWN, ".lora_B.default.weight": UP}


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Put an adapter into every layer that `config.targets` names and freeze all else; B is 0, so nothing changes yet.

    Raises:
        ValueError: peft is missing, no layer has such a name, or an adapted layer is not linear.
    """
    _inject(model, rank=config.rank, alpha=config.alpha, targets=config.targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(published_name(name) is not None)
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is not None and not isinstance(base, nn.Linear):
            raise ValueError(f"learner.lora.targets names {name}, a {type(base).__name__}: only linear layers fit")


def add_random(model: Any, config: LoraConfig) -> dict[str, Tensor]:
    """Put adapters into a model that change it, and return them as they would be published."""
    add_adapters(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in _adapters(model).values():
            deviation = 0.3 * parameter.shape[-1] ** -0.5  # so that both make a tenth of what they are given
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return {name: own.detach() * published_scale(name, config) for name, own in _adapters(model).items()}


def bound_adapters(model: Any, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's own adapters by their published names; at first they are made of what is published, and change nothing.

    Raises:
        ValueError: peft is missing, or adapters are published of layers that the model does not have.
    """
    if not _adapters(model):
        layers, modules = adapted_layers(published), dict(model.named_modules())
        if unknown := sorted(layer for layer in layers if not isinstance(modules.get(layer), nn.Linear)):
            raise ValueError(f"adapters are published of {unknown}: {type(model).__name__} has no such linear layers")
        rank = rank_of(published)
        with torch.inference_mode(mode=False):
            _inject(model, rank=rank, alpha=rank, targets=sorted(layers))  # their scale is in B
    return {name: parameter.requires_grad_(False) for name, parameter in _adapters(model).items()}


def _adapters(model: Any) -> dict[str, nn.Parameter]:
    named = ((published_name(name), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if name is not None}


def _inject(model: Any, *, rank: int, alpha: int, targets: str | list[str]) -> None:
    try:
        import peft
    except ImportError as error:
        raise ValueError("learner.lora needs peft: install pmdflow with its `lora` extra") from error
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0), model
    )


def published_name(name: str) -> str | None:
    """The name under which an adapter's parameter is published; None for all other parameters."""
    for suffix, published in _NAMES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + published
    return None


def published_scale(name: str, config: LoraConfig) -> float:
    """The factor of a published tensor: the scale goes into B, so that the update is B @ A."""
    return config.alpha / config.rank if name.endswith(UP) else 1.0
