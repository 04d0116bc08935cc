"""Tokenizers of local Hugging Face folders: from a prompt's text to its token ids, and which ids end a sequence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError

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
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes of a class without its files
        raise ValueError(f"model.path is {model_path!r}: it has no tokenizer; copy the files of its model there")
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
    """Every token id that ends a sequence of a local Hugging Face folder.

    The `eos_token_id` of config.json and generation_config.json, the tokenizer's, and the special token with which
    the chat template ends what the assistant says. A folder without a tokenizer has those of its files.

    Raises:
        ValueError: there is none.
    """
    ids = _eos_ids(Path(model_path) / "config.json") | _eos_ids(Path(model_path) / "generation_config.json")
    try:
        tokenizer = load_tokenizer(model_path)
    except ValueError:
        tokenizer = None
    if tokenizer is not None:
        ids |= {id for id in (tokenizer.eos_token_id, _turn_end(tokenizer)) if id is not None}
    if not ids:
        raise ValueError(f"{model_path} names no eos_token_id; set it in generation_config.json")
    return frozenset(ids)


def _eos_ids(path: Path) -> set[int]:
    """Those that a JSON file of a model folder names, for the model or for the text model in it."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    named = [section.get("eos_token_id") for section in (values, values.get("text_config") or {})]
    return {id for ids in named if ids is not None for id in (ids if isinstance(ids, list) else [ids])}


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template renders behind the assistant's words; None if it renders none."""
    if not tokenizer.chat_template:
        return None
    words = "pmdflow"
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    try:
        rendered = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except (
        TemplateError,
        TypeError,
        ValueError,
    ):  # it cannot render such a conversation, so it says nothing of its end
        return None
    _, found, behind = rendered.rpartition(words)
    special = {id: str(token.content) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [(len(text), id) for id, text in special.items() if found and behind.lstrip().startswith(text)]
    return max(ends)[1] if ends else None
