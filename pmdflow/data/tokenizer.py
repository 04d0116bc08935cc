"""Tokenizers of local Hugging Face folders: from a prompt's text to its token ids, and which ids end a sequence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pmdflow.errors import PromptTooLong
from pmdflow.types import Int32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[[str], Int32]


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face folder; never asks the network.

    Raises:
        ValueError: the folder is missing or has no tokenizer.
    """
    if not Path(model_path).is_dir():
        raise ValueError(f"model.path is {model_path!r}: there is no such folder")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.path is {model_path!r}: cannot load its tokenizer: {error}") from error
    return tokenizer


def make_tokenize(model_path: str, *, max_tokens: int | None = None) -> Tokenize:
    """Return the function from a prompt's text to its token ids, shape [P].

    The text is one user message of the chat template, with the generation prompt, where the tokenizer has a
    template; otherwise the text and a newline. No other special token is added.

    Args:
        model_path: Folder with the tokenizer.
        max_tokens: `data.max_prompt_tokens`; a longer prompt raises `PromptTooLong`. None is unlimited.

    Raises:
        ValueError: no tokenizer in the folder.
    """
    tokenizer = load_tokenizer(model_path)

    def tokenize(text: str) -> Int32:
        if tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            rendered = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        else:
            rendered = text + "\n"
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"model.path is {model_path!r}: its tokenizer makes no token of the prompt {text!r:.200}")
        if max_tokens is not None and len(ids) > max_tokens:
            raise PromptTooLong(
                f"data.max_prompt_tokens is {max_tokens}, but the prompt {text!r:.80} has {len(ids)} tokens; raise it "
                "as far as the model's positions and learner.tokens_per_microbatch allow, or leave such prompts out"
            )
        return np.asarray(ids, dtype=np.int32)

    return tokenize


def end_ids(model_path: str) -> frozenset[int]:
    """End-of-sequence ids of the generation config; of the tokenizer where that has none.

    Raises:
        ValueError: neither names one.
    """
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(model_path, local_files_only=True).eos_token_id
    except OSError:
        ids = None
    if ids is None:
        ids = load_tokenizer(model_path).eos_token_id
    if ids is None:
        raise ValueError(f"{model_path} names no eos_token_id; set it in generation_config.json")
    return frozenset([ids] if isinstance(ids, int) else ids)
