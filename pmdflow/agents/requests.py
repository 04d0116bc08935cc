"""What programs ask for: the bodies of OpenAI's HTTP form, checked, as far as an answer is made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pmdflow.data.messages import parse_chat

MAX_SAMPLES = 128
"""Most answers of one request (`n`)."""
_UNSAMPLED: Mapping[str, tuple[Any, ...]] = {
    "temperature": (),
    "top_p": (1,),
    "top_k": (-1,),
    "min_p": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
}
"""What a request may ask of the sampling, and values that change nothing."""
_UNSUPPORTED = ("logit_bias", "functions", "function_call", "audio", "guided_json", "guided_regex", "suffix")


class RequestRefused(ValueError):
    """A request that cannot be answered; `status` is HTTP's."""

    def __init__(self, message: str, *, status: int = 400, kind: str = "invalid_request_error") -> None:
        """Say why."""
        super().__init__(message)
        self.status, self.kind = status, kind


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    model: str = ""
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    n: Annotated[int, Field(gt=0, le=MAX_SAMPLES)] = 1
    stop: list[str] = []
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("stream", "n", mode="before")
    @classmethod
    def _defaults(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value


class _Function(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    arguments: str | dict[str, Any] | None = None


class _Call(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    function: _Function


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    tool_calls: list[_Call] | None = None


class _ChatBody(_Body):
    messages: list[_Message]
    tools: list[dict[str, Any]] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    logprobs: bool | None = None


class _TextBody(_Body):
    prompt: str | list[Annotated[int, Field(ge=0)]]
    logprobs: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        one = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list)
        return value[0] if one else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """One request for a turn of the model."""

    messages: tuple[Mapping[str, Any], ...] | None
    """The conversation; None: `prompt` is the history."""
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt: str | tuple[int, ...] = ""
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    samples: int = 1
    logprobs: bool = False
    content: str
    """A digest that stands for all of the above: two requests with the same ask for the same."""
    asked: Mapping[str, Any]
    """The sampling that it asks for, which is not used."""
    attempt: int | None = None
    """What the client counts: 0 is its first, more are sent again; None: it does not say."""
    idempotency_key: str | None = None
    """A request with the key of an earlier one is that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """The client has read the answer to a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """What a program says of its own episode."""

    rewards: Mapping[str, float]
    """By name."""


def parse_turn(body: Any, *, chat: bool, attempt: int | None = None, idempotency_key: str | None = None) -> TurnRequest:
    """Read the JSON body of `/v1/chat/completions`, or of `/v1/completions`.

    Raises:
        RequestRefused: what is wrong with it, or not supported.
    """
    try:
        check_text(body)
        return _parse_turn(body, chat, attempt, idempotency_key)
    except ValidationError as error:
        raise RequestRefused(_first(error)) from error
    except RecursionError:
        raise RequestRefused("the body is nested too deeply") from None


def _parse_turn(body: Any, chat: bool, attempt: int | None, idempotency_key: str | None) -> TurnRequest:
    given: Any = (_ChatBody if chat else _TextBody).model_validate(body)
    _refuse_unsupported(body, given.stop)
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt: str | tuple[int, ...] = ""
    if chat:
        try:
            parsed = parse_chat(body["messages"], given.tools if body.get("tool_choice") != "none" else None)
        except ValueError as error:
            raise RequestRefused(str(error)) from error
        messages, tools = parsed.messages, parsed.tools
    else:
        prompt = given.prompt if isinstance(given.prompt, str) else tuple(given.prompt)
        if not prompt:
            raise RequestRefused("prompt is empty")
    max_tokens = (given.max_completion_tokens if chat else None) or given.max_tokens
    asks = [messages, tools, prompt, max_tokens, given.stop, given.n, bool(given.logprobs)]
    return TurnRequest(
        messages=messages,
        tools=tools,
        prompt=prompt,
        max_tokens=max_tokens,
        stop=tuple(given.stop),
        samples=given.n,
        logprobs=bool(given.logprobs),
        content=hashlib.sha256(json.dumps(asks, sort_keys=True, default=str).encode()).hexdigest(),
        asked={name: body[name] for name in _UNSAMPLED if _changes(name, body.get(name))},
        attempt=attempt,
        idempotency_key=idempotency_key,
    )


def parse_reward(body: Any) -> Posted:
    """Read the body of `/reward`: a number, `{"reward": 0.5}`, or numbers by name.

    Raises:
        RequestRefused: it is none of these, or a number is not finite.
    """
    given = {"reward": body} if isinstance(body, int | float) else body
    if not isinstance(given, Mapping) or not given:
        raise RequestRefused('a reward is a number, {"reward": number}, or several numbers by name')
    check_text(list(given))
    try:
        rewards = {str(name): float(value) for name, value in given.items()}
    except (TypeError, ValueError, OverflowError):
        raise RequestRefused(f"a reward is a finite number, not {given!r:.80}") from None
    if bad := [name for name, value in rewards.items() if not -1e300 < value < 1e300]:
        raise RequestRefused(f"{bad[0]} is {rewards[bad[0]]}; rewards must be finite")
    return Posted(rewards=rewards)


def check_text(value: Any) -> None:
    """Refuse what JSON can spell and no other text can: half of a character of two units.

    Raises:
        RequestRefused: it has one.
        RecursionError: it is nested too deeply.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        why = f"it has {error.object[error.start]!r}, which is half of a character (a lone surrogate)"
        raise RequestRefused(f"the body is no text: {why}") from error


def _refuse_unsupported(body: Mapping[str, Any], stop: Sequence[str]) -> None:
    if any(not text for text in stop):
        raise RequestRefused("stop has an empty text")
    given = [name for name in _UNSUPPORTED if body.get(name)]
    if body.get("echo") or body.get("best_of") not in (None, 1):
        given.append("echo and best_of")
    if given:
        raise RequestRefused(f"{', '.join(given)}: not supported, for it changes what is sampled; leave it out")


def _changes(name: str, value: Any) -> bool:
    return value is not None and value not in _UNSAMPLED[name]


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return f"{where}: {first['msg']}"
