"""LoRA adapters of the tiny model, in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.paths import TINY


def save_adapter(folder: Path, base: Path | str = TINY, *, seed: int = 1, **settings: Any) -> Path:
    """A rank-4 adapter with random weights."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(TINY)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**written, "base_model_name_or_path": str(base)}))
    return folder
