"""Low-rank adapters through peft, and the names under which they are published."""

from __future__ import annotations

from typing import Any

from torch import nn

from pmdflow.config.schema import LoraConfig
from pmdflow.weights.lora import DOWN, UP

_NAMES = {".lora_A.default.weight": DOWN, ".lora_B.default.weight": UP}


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Put an adapter into every layer that `config.targets` names and freeze all else; B is 0, so nothing changes yet.

    Raises:
        ValueError: peft is missing, no layer has such a name, or an adapted layer is not linear.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("learner.lora needs peft: install pmdflow with its `lora` extra") from error
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0), model
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(published_name(name) is not None)
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is not None and not isinstance(base, nn.Linear):
            raise ValueError(f"learner.lora.targets names {name}, a {type(base).__name__}: only linear layers fit")


def published_name(name: str) -> str | None:
    """The name under which an adapter's parameter is published; None for all other parameters."""
    for suffix, published in _NAMES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + published
    return None


def published_scale(name: str, config: LoraConfig) -> float:
    """The factor of a published tensor: the scale goes into B, so that the update is B @ A."""
    return config.alpha / config.rank if name.endswith(UP) else 1.0
