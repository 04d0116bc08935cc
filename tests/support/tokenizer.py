"""Tokenizers for model folders that tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.support.paths import TINY


def write_tokenizer(folder: Path, *, chat_template: str | None) -> Any:
    """That of the quick start with special tokens added, of which the last is its end of sequence."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|turn_end|>", "<|turn_end|>2"]})
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer
