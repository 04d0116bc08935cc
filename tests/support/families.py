"""Tiny random models of the families that people train, with windows, sinks and soft caps that short answers reach."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support.engine import EOS
from tests.support.paths import TINY

WINDOW = 4
"""Every sequence is longer, so that a layer which sees all gives other log-probs."""
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 128, "moe_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": EOS,
    "bos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, **MIXED},
    "qwen3": {"use_sliding_window": True, **MIXED},
    "qwen3_moe": {},
    "gemma2": {**MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 8},
    "gpt_oss": MIXED,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "olmo3": MIXED,
    "phi3": {"sliding_window": WINDOW},
}


def write_family(family: str, folder: Path, **sizes: Any) -> None:
    """Save a model of a family, with a tokenizer that it has rows for; `sizes` are set besides."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES.get(family, {}), **sizes})
    made = AutoModelForCausalLM.from_config(config)
    for name, parameter in made.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
