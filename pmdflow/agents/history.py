"""From what a program sends to the token ids that the model goes on from: a history grows, it is never made anew.

A request's conversation mostly begins with an earlier one and the answer to it. What came after that is all that is
tokenized: the tokens before are those that were sent and generated, whatever a tokenizer would make of their text.
"""

from __future__ import annotations

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
class Target:
    """What the model goes on from."""

    tokens: tuple[int, ...]
    """The whole history."""
    broken: str = ""
    """Why it does not go on from an earlier turn of the same conversation, if it should."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A conversation that has been answered."""

    messages: tuple[str, ...]
    """Each in one spelling, the answer last."""
    tools: str
    given: tuple[Mapping[str, Any], ...]
    tokens: tuple[int, ...]
    """Of all of it, as sent and generated."""


@dataclass(slots=True)
class History:
    """The conversations of one episode. A restart loses nothing: a program that is started again asks again."""

    tokenizer: PreTrainedTokenizerBase
    style: Style
    max_chars: int | None = None
    """A text that is longer has too many tokens: it is not even tokenized, which would keep all others waiting."""
    _conversations: list[_Known] = field(default_factory=list)
    _texts: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

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
        tokens = (*target.tokens, *generated)
        if request.messages is None:
            self._texts.append((self._text(target.tokens) + said.text, tokens))
            return
        given = (*request.messages, said.message)
        spelt = tuple(_spelt(message) for message in given)
        self._conversations.append(_Known(spelt, _tools(request), given, tokens))

    def _of_chat(self, request: TurnRequest) -> Target:
        assert request.messages is not None
        spelt, tools = tuple(_spelt(message) for message in request.messages), _tools(request)
        before = [
            known
            for known in self._conversations
            if known.tools == tools and spelt[: len(known.messages)] == known.messages
        ]
        whole = self._render(request.messages, request.tools, answer=True)
        if not before:
            return Target(self._ids(whole))
        known = max(reversed(before), key=lambda known: len(known.messages))  # of equal ones the latest
        told = self._render(known.given, request.tools)
        asked = self._render(known.given[:-1], request.tools, answer=True)
        for earlier, later in ((asked, told), (told, whole)):
            if not later.startswith(earlier):
                return Target(self._ids(whole), broken=_difference(earlier, later))
        end = self._render([*known.given[:-1], {"role": "assistant", "content": _WORDS}], request.tools)
        added = end.rpartition(_WORDS)[2] + whole[len(told) :]
        ended = self._text(known.tokens[-1:])
        return Target((*known.tokens, *self._ids(added.removeprefix(ended))))

    def _of_text(self, request: TurnRequest) -> Target:
        if not isinstance(request.prompt, str):
            return Target(request.prompt)
        before = [(text, tokens) for text, tokens in self._texts if request.prompt.startswith(text)]
        if not before:
            return Target(self._ids(request.prompt))
        text, tokens = max(reversed(before), key=lambda known: len(known[0]))
        return Target((*tokens, *self._ids(request.prompt[len(text) :])))

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
