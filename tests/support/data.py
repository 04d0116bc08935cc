"""Small data and tokenizers, made without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from pmdflow.config.schema import Config
from pmdflow.types import Prompt

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(folder: Path, *, chat_template: str | None = None) -> str:
    """A byte-level tokenizer in a Hugging Face folder, made without a network."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    if chat_template:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)


def make_config(model: str, task: Any, *, held_out: int = 8, seed: int = 0, sets: Any = None, **data: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test", "iterations": 1, "seed": seed},
            "model": {"path": model},
            "data": {"task": task, "max_tokens": 16, **data},
            "eval": {"prompts": held_out, "sets": sets or {}},
            "reward": {"functions": [{"function": "pmdflow.reward.reasoning_gym:score"}]},
            "scheduler": {"groups_per_iteration": 4, "tokens_per_iteration": 100},
        }
    )


def same(a: Prompt, b: Prompt) -> bool:
    return (a.id, a.text, a.metadata) == (b.id, b.text, b.metadata) and np.array_equal(a.tokens, b.tokens)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]], *, row_group_size: int | None = None) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)
