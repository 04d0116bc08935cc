"""From what a program sends to the token ids that the model goes on from: a history grows, it is never made anew.

A request's conversation mostly begins with an earlier one and the answer to it. What came after that is all that is
tokenized: the tokens before are those that were sent and generated, whatever a tokenizer would make of their text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pmdflow.agents.requests import RequestRefused, TurnRequest
from pmdflow.agents.tools import Said
from pmdflow.data.messages import Style

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = "pmdflow-0123456789"
"""Stands for what the assistant said."""
_SHOWN = 40
"""Characters shown of a difference."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A conversation that has been answered; what it goes on from is held once, whatever goes on from it."""

    before: _Known | None
    """The one that it goes on from."""
    given: tuple[Mapping[str, Any], ...]
    """Messages since then, the answer last."""
    added: tuple[int, ...]
    """Tokens since then, as sent and generated."""

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """All of them."""
        return tuple(message for known in self._chain() for message in known.given)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(token for known in self._chain() for token in known.added)

    def _chain(self) -> list[_Known]:
        chain, known = [self], self.before
        while known is not None:
            chain.append(known)
            known = known.before
        return chain[::-1]


@dataclass(frozen=True, slots=True)
class Target:
    """What the model goes on from."""

    tokens: tuple[int, ...]
    """The whole history."""
    broken: str = ""
    """Why it does not go on from an earlier turn of the same conversation, if it should."""
    known: _Known | None = None
    """The earlier turn that it goes on from."""

    @property
    def follows(self) -> bool:
        """It goes on from an earlier turn of the same conversation."""
        return self.known is not None


@dataclass(slots=True)
class History:
    """The conversations of one episode. A restart loses nothing: a program that is started again asks again."""

    tokenizer: PreTrainedTokenizerBase
    style: Style
    max_chars: int | None = None
    """A text that is longer has too many tokens: it is not even tokenized, which would keep all others waiting."""
    _conversations: dict[bytes, _Known] = field(default_factory=dict)
    """By digests of their tools and messages; of equal ones the latest."""
    _texts: dict[bytes, _Known] = field(default_factory=dict)
    """By digests of the whole text."""
    _lengths: set[int] = field(default_factory=set)
    """Of the texts, in characters."""

    def target(self, request: TurnRequest) -> Target:
        """The tokens that a request wants to be gone on from.

        Raises:
            RequestRefused: the template or the tokenizer fails on it, or there is no template.
        """
        try:
            return self._of_text(request) if request.messages is None else self._of_chat(request)
        except RequestRefused:
            raise
        except Exception as error:  # of one request: it must not end the actor that serves all
            raise RequestRefused(f"the model's tokenizer fails on this history: {type(error).__name__}") from error

    def answered(self, request: TurnRequest, target: Target, said: Said, generated: Sequence[int]) -> None:
        """Know a turn from now on."""
        before, length = target.known, 0 if target.known is None else len(target.known.tokens)
        added = (*target.tokens[length:], *generated)
        if request.messages is None:
            given = request.prompt if isinstance(request.prompt, str) else self._text(target.tokens)
            text = given + said.text  # as its client knows it: without what ended earlier turns
            self._lengths.add(len(text))
            self._texts[_digest(text)] = _Known(before, (), added)
            return
        kept = 0 if before is None else len(before.messages)
        digests = _digests(_tools(request), (*request.messages, said.message))
        self._conversations[digests[-1]] = _Known(before, (*request.messages[kept:], said.message), added)

    def _of_chat(self, request: TurnRequest) -> Target:
        assert request.messages is not None
        digests = _digests(_tools(request), request.messages)
        known = next((self._conversations[one] for one in reversed(digests) if one in self._conversations), None)
        whole = self._render(request.messages, request.tools, answer=True)
        if known is None:
            return Target(self._ids(whole))
        given, tokens = known.messages, known.tokens
        told = self._render(given, request.tools)
        asked = self._render(given[:-1], request.tools, answer=True)
        for earlier, later in ((asked, told), (told, whole)):
            if not later.startswith(earlier):
                return Target(self._ids(whole), broken=_difference(earlier, later))
        end = self._render([*given[:-1], {"role": "assistant", "content": _WORDS}], request.tools)
        added = end.rpartition(_WORDS)[2] + whole[len(told) :]
        ended = self._text(tokens[-1:])
        return Target((*tokens, *self._ids(added.removeprefix(ended))), known=known)

    def _of_text(self, request: TurnRequest) -> Target:
        prompt = request.prompt
        if not isinstance(prompt, str):
            return Target(prompt)
        for length in sorted(self._lengths, reverse=True):
            known = self._texts.get(_digest(prompt[:length])) if length <= len(prompt) else None
            if known is not None:
                return Target((*known.tokens, *self._ids(prompt[length:])), known=known)
        return Target(self._ids(prompt))

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, answer: bool = False
    ) -> str:
        if not self.tokenizer.chat_template:
            raise RequestRefused("the model has no chat template: ask /v1/completions, or choose a model that has one")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [_for_template(message) for message in messages],
                    tools=[dict(tool) for tool in tools] or None,
                    add_generation_prompt=answer,
                    tokenize=False,
                    **self.style.template_args,
                )
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise RequestRefused(f"the model's chat template fails on these messages: {error}") from error

    def _ids(self, text: str) -> tuple[int, ...]:
        if self.max_chars is not None and len(text) > self.max_chars:
            raise RequestRefused(
                f"the request adds {len(text)} characters, which are more tokens than an episode may have "
                "(data.max_tokens)",
                kind="context_length_exceeded",
            )
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def _digest(text: str, before: bytes = b"") -> bytes:
    return hashlib.blake2b(before + text.encode(errors="surrogatepass"), digest_size=16).digest()


def _digests(tools: str, messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Of the conversation up to each message, that included."""
    digests = [_digest(tools)]
    for message in messages:
        digests.append(_digest(_spelt(message), digests[-1]))
    return digests[1:]


def _spelt(message: Mapping[str, Any]) -> str:
    """One spelling of a message, whatever a client's library adds to it or leaves out."""
    calls = [
        (call["function"]["name"], _arguments(call["function"].get("arguments")))
        for call in message.get("tool_calls") or ()
    ]
    said = message.get("content") or ""
    return json.dumps([message["role"], said, calls, message.get("name"), message.get("tool_call_id")])


def _arguments(given: Any) -> str:
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        value = given
    return json.dumps(value, sort_keys=True)


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates want the arguments of calls as objects, and a content that is text."""
    read = {**message, "content": message.get("content") or ""}
    if message.get("tool_calls"):
        read["tool_calls"] = [
            {
                **call,
                "function": {**call["function"], "arguments": json.loads(_arguments(call["function"]["arguments"]))},
            }
            for call in message["tool_calls"]
        ]
    return read


def _tools(request: TurnRequest) -> str:
    return json.dumps(request.tools, sort_keys=True)


def _difference(earlier: str, later: str) -> str:
    """Where a rendering parts from the one before it."""
    at = next(
        (i for i, (a, b) in enumerate(zip(earlier, later, strict=False)) if a != b), min(len(earlier), len(later))
    )
    shown = (text[max(at - 10, 0) : at + _SHOWN] for text in (earlier, later))
    return "the chat template says the earlier turns anew: after {} characters {!r} became {!r}".format(at, *shown)
