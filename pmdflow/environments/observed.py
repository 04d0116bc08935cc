"""From what an environment says to the token ids that are appended; a history is never tokenized anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pmdflow.environments.protocol import Observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = "pmdflow-0123456789"
"""Stands for what the assistant said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """How a model's tokenizer says what environments say."""

    tokenizer: PreTrainedTokenizerBase
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def tokens(self, observation: Observation, *, after: Sequence[int] = ()) -> tuple[int, ...]:
        """What is appended after a turn of the model.

        Raises:
            ValueError: it says something in two ways, there is no such token, or the chat template fails on it.
        """
        given = [name for name in ("text", "messages", "tokens") if len(getattr(observation, name))]
        if len(given) > 1:
            raise ValueError(f"an observation has {' and '.join(given)}: give one of them")
        if observation.messages:
            return self._ids(self._behind(observation.messages, after))
        if len(observation.tokens):
            tokens = tuple(int(token) for token in observation.tokens)
            wrong = [token for token in tokens if not 0 <= token < len(self.tokenizer)]
            if wrong:
                raise ValueError(f"an observation has token {wrong[0]}; the model has 0 to {len(self.tokenizer) - 1}")
            return tokens
        return self._ids(observation.text) if observation.text else ()

    def text(self, tokens: Sequence[int], *, raw: bool = False) -> str:
        """Text of token ids, spaces as they were generated; `raw` keeps special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not raw, clean_up_tokenization_spaces=False))

    def _behind(self, messages: Sequence[Mapping[str, Any]], after: Sequence[int]) -> str:
        """Text from the end of the model's turn to where it speaks again."""
        talk: list[Mapping[str, Any]] = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _WORDS}]
        before, whole = self._render(talk), self._render([*talk, *messages], answer=True)
        if not whole.startswith(before) or _WORDS not in before:
            raise ValueError(
                "the model's chat template does not append these messages to a conversation, so they cannot follow "
                "what was generated; say `text` or `tokens`"
            )
        end = before.rpartition(_WORDS)[2] + whole[len(before) :]
        return end.removeprefix(self.text(after[-1:], raw=True)) if after else end

    def _render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError("an observation has messages, but the model has no chat template; say `text` or `tokens`")
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=answer, tokenize=False, **self.template_args
        )
        return str(rendered)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def checked(observation: Observation) -> Observation:
    """The same.

    Raises:
        ValueError: a number or the key is none.
    """
    if "reward" in observation.metrics:
        raise ValueError("an observation has a metric `reward`: give it as its reward")
    said = dict(observation.metrics) | ({} if observation.reward is None else {"reward": observation.reward})
    for name, value in said.items():
        if not isinstance(name, str) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"an observation has {name!r}: {value!r:.80}; rewards and metrics are finite numbers")
        if not is_text(name):
            raise ValueError(f"an observation has {name!r:.80}, which has half a character: a name is a text")
    if observation.key is not None and not isinstance(observation.key, str):
        raise ValueError(f"an observation has the key {observation.key!r:.80}; a key is a text")
    return observation


def is_text(text: str) -> bool:
    """Whether it can be written: half of a surrogate pair, which JSON may hold, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
