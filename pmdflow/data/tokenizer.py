"""Tokenizers of local Hugging Face folders: from a prompt's text to its token ids, and which ids end a sequence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from pmdflow.data.messages import Chat, Style, form
from pmdflow.data.model_folder import eos_ids
from pmdflow.errors import PromptTooLong
from pmdflow.types import Int32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[[str | Chat], Int32]


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face folder; never asks the network.

    Raises:
        ValueError: the folder is missing or has no tokenizer.
    """
    if not Path(model_path).is_dir():
        raise ValueError(f"model.path is {model_path!r}: there is no such folder")
    try:
        tokenizer = _loader(Path(model_path))(model_path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model.path is {model_path!r}: its tokenizer brings code of its own, which is never run; choose a "
                "model whose tokenizer transformers knows by itself"
            ) from error
        raise ValueError(f"model.path is {model_path!r}: cannot load its tokenizer: {error}") from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes of a class without its files
        raise ValueError(f"model.path is {model_path!r}: it has no tokenizer; copy the files of its model there")
    return tokenizer


def _loader(folder: Path) -> Callable[..., PreTrainedTokenizerBase]:
    """What loads a folder's tokenizer.

    To find the class, `AutoTokenizer` loads torch and what knows every model, seconds in each process; a folder that
    names the general class does without.
    """
    general = ("TokenizersBackend", "PreTrainedTokenizerFast")
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
        named = settings.get("tokenizer_class") in general and "auto_map" not in settings
    except (OSError, ValueError, AttributeError):
        named = False
    if named and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained


class PromptTokenizer:
    """From a prompt to its token ids, by the model's own chat template.

    A text is one user message, with the generation prompt. Without a template it is the text and a newline. No other
    special token is added.
    """

    def __init__(
        self,
        model_path: str,
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int | None,
        style: Style,
        keep: int | None = None,
    ) -> None:
        """See `make_tokenize`."""
        self._keep = keep
        self._forms: set[Any] = set()
        """Of the conversations that the template has rendered."""
        self._path, self._tokenizer, self._max_tokens, self._style = model_path, tokenizer, max_tokens, style
        if not self._tokenizer.chat_template and (style.system is not None or style.template_args):
            raise ValueError(
                f"model.path is {model_path!r}, which has no chat template for data.system and data.template_args; "
                "remove these, or choose a model that has one"
            )
        try:
            self._overhead: int | None = len(self._ids("?"))
        except ValueError:  # the template wants more than a text: the prompts may have it
            self._overhead = None

    def __call__(self, prompt: str | Chat) -> Int32:
        """Token ids, shape [P].

        Raises:
            PromptTooLong: it has more than `max_tokens`.
            ValueError: the template fails on it, or it makes no token.
        """
        ids = self._ids(prompt)
        if not ids:
            raise ValueError(f"model.path is {self._path!r}: its tokenizer makes no token of {_shown(prompt)}")
        if self._max_tokens is not None and len(ids) > self._max_tokens:
            raise PromptTooLong(
                f"data.max_prompt_tokens is {self._max_tokens}, but the prompt {_shown(prompt)} has {len(ids)} tokens; "
                "raise it as far as the model's positions and learner.tokens_per_microbatch allow, or leave such "
                "prompts out"
            )
        return np.asarray(ids, dtype=np.int32)

    def excess(self, prompt: str | Chat) -> int:
        """Number of tokens if it is too long, else 0; short ones are told by their bytes, a token's least size.

        Raises:
            ValueError: the template fails on messages of this form.
        """
        if isinstance(prompt, Chat) and (found := form(prompt)) not in self._forms:
            self._render(prompt)
            self._forms.add(found)
        if self._max_tokens is None or (self._overhead is not None and self._bound(prompt) <= self._max_tokens):
            return 0
        length = len(self._ids(prompt))
        return length if length > self._max_tokens else 0

    def _bound(self, prompt: str | Chat) -> int:
        """At least as many as its tokens; `_overhead` holds the template's own, system message and suffix."""
        assert self._overhead is not None
        if isinstance(prompt, str):
            return self._overhead + len(prompt.encode())
        messages = sum(self._overhead + len(str(message).encode()) for message in prompt.messages)
        return messages + len(str(prompt.tools).encode())

    def _ids(self, prompt: str | Chat) -> list[int]:
        ids: list[int] = self._tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"]
        return ids[: self._keep]

    def _render(self, prompt: str | Chat) -> str:
        chat = self._style.chat(prompt)
        if not self._tokenizer.chat_template:
            if isinstance(prompt, Chat):
                raise ValueError(
                    f"model.path is {self._path!r}, which has no chat template for the messages of {_shown(prompt)}; "
                    "choose a model that has one, or give prompts as texts"
                )
            return chat.text + "\n"
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in chat.messages],
                    tools=[dict(tool) for tool in chat.tools] or None,
                    add_generation_prompt=True,
                    tokenize=False,
                    **self._style.template_args,
                )
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise ValueError(
                f"model.path is {self._path!r}: its chat template fails on {_shown(prompt)}: {error}; mend the template"
                " (chat_template.jinja or tokenizer_config.json), or give it what it asks for (data.system, "
                "data.template_args, the messages)"
            ) from error


def make_tokenize(
    model_path: str,
    *,
    max_tokens: int | None = None,
    style: Style | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep: int | None = None,
) -> PromptTokenizer:
    """Return the function from a prompt to its token ids, shape [P].

    Args:
        model_path: Folder with the tokenizer.
        max_tokens: `data.max_prompt_tokens`; a longer prompt raises `PromptTooLong`. None is unlimited.
        style: System message, suffix and arguments of the template.
        tokenizer: The folder's, if it is loaded already.
        keep: How many of the first tokens are kept; None keeps all.

    Raises:
        ValueError: no tokenizer in the folder, or a chat template that fails.
    """
    tokenizer = tokenizer or load_tokenizer(model_path)
    return PromptTokenizer(model_path, tokenizer=tokenizer, max_tokens=max_tokens, style=style or Style(), keep=keep)


def _shown(prompt: str | Chat) -> str:
    return f"{prompt.text if isinstance(prompt, Chat) else prompt!r:.80}"


def end_ids(model_path: str) -> frozenset[int]:
    """Every token id that ends a sequence of a local Hugging Face folder.

    The `eos_token_id` of config.json and generation_config.json, the tokenizer's, and the special token with which
    the chat template ends what the assistant says. A folder without a tokenizer has those of its files.

    Raises:
        ValueError: there is none, or one of the files names something else.
    """
    ids = eos_ids(Path(model_path))
    try:
        tokenizer = load_tokenizer(model_path)
    except ValueError:
        tokenizer = None
    if tokenizer is not None:
        ids |= {id for id in (tokenizer.eos_token_id, _turn_end(tokenizer)) if id is not None}
    if not ids:
        raise ValueError(f"{model_path} names no eos_token_id; set it in generation_config.json")
    return frozenset(ids)


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
