"""Chat messages: from what a row holds to what the chat template gets, and by what a prompt is known again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS_WITHOUT_TEXT = "images and other media are not supported"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation that the model continues."""

    messages: tuple[Mapping[str, Any], ...]
    """Each with `role` and `content`, and whatever else the template reads (`tool_calls`, `name`)."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of tools."""

    @property
    def text(self) -> str:
        """What the user said last; what was said last at all where no user speaks."""
        said = [message for message in self.messages if message["role"] == "user"] or self.messages
        return str(said[-1]["content"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How the prompts of one source are worded."""

    system: str | None = None
    suffix: str = ""
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def chat(self, prompt: str | Chat) -> Chat:
        """The prompt with the system message, where it has none, and the suffix.

        Example:
            >>> Style(system="Be brief.", suffix=" Think.").chat("1 + 1?").messages
            ({'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '1 + 1? Think.'})
        """
        given = prompt if isinstance(prompt, Chat) else Chat(messages=({"role": "user", "content": prompt},))
        messages = list(given.messages)
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if self.suffix and users:
            messages[users[-1]] = {**messages[users[-1]], "content": messages[users[-1]]["content"] + self.suffix}
        if self.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.system})
        return Chat(messages=tuple(messages), tools=given.tools)


def parse_chat(value: Any, tools: Any = None) -> Chat:
    """Read messages and tools as data sets hold them: lists, or their JSON text; null entries are left out.

    Raises:
        ValueError: what is wrong with them, without a place.
    """
    messages = tuple(_message(message) for message in _listed("messages", value))
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            "the last message is the assistant's: the model answers after a user or tool message; leave it out, or "
            "map it to data.columns.answer"
        )
    schemas = () if tools in (None, "", [], ()) else tuple(_without_nulls(tool) for tool in _listed("tools", tools))
    return Chat(messages=messages, tools=schemas)


def prompt_key(prompt: str | Chat) -> int:
    """64 bits by which a prompt is known again: of all that users say, whatever the white space and the system message.

    Example:
        >>> prompt_key("1 +  1?") == prompt_key(parse_chat([{"role": "user", "content": "1 + 1? "}]))
        True
    """
    texts = [prompt]
    if isinstance(prompt, Chat):
        said = [message for message in prompt.messages if message["role"] == "user"] or prompt.messages
        texts = [message["content"] for message in said]
    words = "\n".join(" ".join(str(text).split()) for text in texts)
    return int.from_bytes(blake2b(words.encode(), digest_size=8).digest(), "little")


def form(chat: Chat) -> Any:
    """What a chat template may stumble over, hashable: roles, keys and kinds of values, but not the words.

    Example:
        >>> form(Style().chat("1 + 1?")) == form(Style().chat("2 + 2?"))
        True
    """
    return _form(chat.messages), _form(chat.tools)


def _form(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((key, inner if key in ("role", "type") else _form(inner)) for key, inner in value.items())
    return tuple(map(_form, value)) if isinstance(value, list | tuple) else (type(value).__name__, bool(value))


def _listed(what: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{what} is a text, but not JSON: {error}") from error
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{what} is {value!r:.80}, not a list with something in it")
    return value


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or value.get("role") not in ROLES:
        raise ValueError(f"a message is {value!r:.80}; it needs a role ({', '.join(ROLES)}) and content")
    return {**_without_nulls(value), "content": _text(value.get("content"))}


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = list(content) if isinstance(content, list | tuple) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or "text" not in part:
            raise ValueError(f"the content of a message holds {part!r:.80}: {PARTS_WITHOUT_TEXT}; leave such rows out")
    return "".join(str(part["text"]) for part in parts)


def _without_nulls(value: Any) -> Any:
    """Parquet fills in, as null, every key that any other row has."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
