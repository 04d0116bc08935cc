"""What is scored: one completion and everything that a reward function may ask about it, in training and evaluation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
"""Metadata key of a task's conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """One completion to score; the fields are those of `pmdflow.reward.function.INPUTS`."""

    completion: str
    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] | None = None
    stop: str = "stop"
    raw_completion: str = ""
    """Left empty where no function asks for it, like `token_ids`."""
    token_ids: Sequence[int] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_tokens(
        cls,
        tokens: Sequence[int],
        *,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Collection[str],
        prompt: str,
        stop: str,
        metadata: Mapping[str, Any],
        rewards: Mapping[str, float] | None = None,
    ) -> ScoreItem:
        """Decode what was generated after a prompt, as far as the rubric's `inputs` need it."""
        return cls(
            completion=decode_text(tokenizer, tokens),
            raw_completion=decode_text(tokenizer, tokens, raw=True) if "raw_completion" in inputs else "",
            token_ids=tokens if "token_ids" in inputs else (),
            prompt=prompt,
            stop=stop,
            metadata=metadata,
            messages=metadata.get(MESSAGES),
            rewards=rewards or {},
        )

    def encode(self) -> bytes:
        """For `decode_inputs` in another process; any `str` survives, also one with lone surrogates.

        Raises:
            TypeError: the metadata is not of plain types.
        """
        values = [
            self.completion, self.prompt, dict(self.metadata), self.messages, self.stop, self.raw_completion,
            list(self.token_ids), dict(self.rewards),
        ]  # fmt: skip
        return encode(values)


def decode_inputs(data: bytes) -> dict[str, Any]:
    """The inputs of a reward function, but for `timeout_s`."""
    names = ("completion", "prompt", "metadata", "messages", "stop", "raw_completion", "token_ids", "rewards")
    return dict(zip(names, decode(data), strict=True))


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, raw: bool = False) -> str:
    """Text of token ids, spaces as they were generated; `raw` keeps special tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=not raw, clean_up_tokenization_spaces=False))


def encode(value: Any) -> bytes:
    """A message between runner and worker to bytes."""
    data: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return data


def decode(data: bytes) -> Any:
    """Undo `encode`."""
    return msgpack.unpackb(data, unicode_errors="surrogatepass", strict_map_key=False)
