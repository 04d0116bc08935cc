"""Turns of the model in the words of its clients: where a turn ends, what it says, and the answer made of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmdflow.agents.answers import Choice, chat_answer, text_answer
from pmdflow.agents.asked import Asked
from pmdflow.agents.record import Turn
from pmdflow.agents.requests import TurnRequest
from pmdflow.agents.tools import ToolFormat, read
from pmdflow.data.stop_text import StopText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """Of one episode."""

    tokenizer: PreTrainedTokenizerBase
    style: ToolFormat
    model: str
    """Its name in answers."""
    ends: Collection[int]
    """Token ids that end a turn."""
    run_stop: tuple[str, ...]
    """Texts that end a turn of any request, and stay in the answer."""
    sampling: Mapping[str, Any]
    """The run's own, which every answer says that asked for another."""

    def end(self, request: TurnRequest, tokens: Sequence[int], *, full: bool) -> int | None:
        """Tokens of the turn that is the answer, where they begin with a whole one; `full`: no more can come."""
        ends = [at + 1 for at, token in enumerate(tokens) if token in self.ends][:1]
        if request.max_tokens is not None and len(tokens) >= request.max_tokens:
            ends.append(request.max_tokens)
        if stop := (*self.run_stop, *request.stop):
            found = StopText(self.tokenizer, stop).find(tokens)
            ends += [] if found is None else [found + 1]
        if full:
            ends.append(len(tokens))
        return min(ends, default=None)

    def choice(self, request: TurnRequest, turn: Turn, *, id: str) -> Choice:
        """What a whole turn says; `id` begins those of its calls."""
        tokens = turn.tokens
        ended = bool(tokens) and tokens[-1] in self.ends
        text = self.text(tokens[:-1] if ended else tokens)
        cut = min((at for at in (text.find(stop) for stop in request.stop) if at >= 0), default=None)
        ended = ended or any(stop in text for stop in self.run_stop)
        return Choice(
            said=read(text if cut is None else text[:cut], self.style, id=id),
            tokens=tokens,
            texts=[self.text([token]) for token in tokens] if request.logprobs else (),
            logprobs=turn.logprobs,
            versions=turn.versions,
            finish="stop" if ended or cut is not None else "length",
        )

    def answer(self, entry: Asked, *, id: str) -> dict[str, Any]:
        """The body for a request that has all of its samples."""
        assert entry.target is not None
        make = text_answer if entry.request.messages is None else chat_answer
        body = make(id, self.model, entry.choices, prompt_tokens=len(entry.target.tokens))
        if entry.request.asked:
            body["pmdflow"]["sampling"] = dict(self.sampling)
        return body

    def text(self, tokens: Sequence[int]) -> str:
        """Special tokens included."""
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def shown(sampling: Mapping[str, Any]) -> str:
    """Settings, for a message."""
    return ", ".join(f"{name} {value}" for name, value in sampling.items())
