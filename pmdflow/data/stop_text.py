"""Stop strings on token ids: incremental detokenization, never a second tokenization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """What decodes token by token.

    Raises:
        ValueError: the tokenizer has no Rust backend.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            "stop texts, of rollout.stop or of an agent's requests, need a tokenizer with a Rust backend "
            f"(tokenizer.json), not {type(tokenizer).__name__}; convert it, or use rollout.stop_token_ids"
        )
    return backend


class StopText:
    """Watches the text of one sequence for the first of some strings.

    A token belongs to the text once its characters are whole, so a stop string whose last character is followed by a
    part of another one inside the same token is found with the token that completes that other one.

    Example:
        >>> stop = StopText(tokenizer, ("</answer>",))  # doctest: +SKIP
        >>> stop.find(tokenizer("4</answer> and").input_ids)  # doctest: +SKIP
        1
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], *, history: Sequence[int] = (), ignored: int = 0
    ) -> None:
        """Watch for `stop`.

        Args:
            tokenizer: One with a Rust backend, as those of Hugging Face folders are.
            stop: Not empty; no string is empty.
            history: Tokens generated before, which a stop string may begin in.
            ignored: Tokens from now on that cannot complete a stop string.

        Raises:
            ValueError: the tokenizer has no Rust backend.
        """
        self._tokenizer = backend_of(tokenizer)
        self._stop = tuple(stop)
        self._kept = max(len(text) for text in stop) - 1
        self.restart(ignored=ignored)
        # A token has a byte or more, a character at most 4: what lies further back is in no string that can end now.
        for token in history[-4 * (self._kept + 1) :]:
            self._feed(token)

    def restart(self, *, ignored: int = 0) -> None:
        """Watch a new text from its beginning; `ignored` as when made."""
        self._stream = DecodeStream(skip_special_tokens=False)
        self._tail = ""
        self._ignored = ignored

    def find(self, tokens: Sequence[int]) -> int | None:
        """Index in `tokens` of the one that completes a stop string, or None; nothing behind it is read."""
        for index, token in enumerate(tokens):
            text = self._feed(token)
            self._ignored -= 1
            if self._ignored < 0 and any(stop in text for stop in self._stop):
                return index
        return None

    def _feed(self, token: int) -> str:
        """Text in which every stop string that `token` completes ends, and none that was complete before."""
        chunk = self._stream.step(self._tokenizer, token)
        if not chunk:
            return ""
        text = self._tail + chunk
        self._tail = text[max(len(text) - self._kept, 0) :]
        return text
