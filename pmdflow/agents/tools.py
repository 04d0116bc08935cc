"""Tool calls in what the model wrote: each family marks them in its own way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

ToolFormat = Literal["hermes", "llama", "kimi", "json"]
Call: TypeAlias = "tuple[str, str]"
"""Name, and arguments as JSON text."""

_HERMES = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", re.DOTALL)
_KIMI = re.compile(
    r"<\|tool_call_begin\|>\s*([^<]*?)\s*<\|tool_call_argument_begin\|>\s*(.*?)\s*<\|tool_call_end\|>", re.DOTALL
)
_KIMI_SECTION = re.compile(r"<\|tool_calls_section_begin\|>.*?(?:<\|tool_calls_section_end\|>|$)", re.DOTALL)
_LLAMA = "<|python_tag|>"
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Said:
    """A turn of the model as a program reads it."""

    text: str
    """All of it, but for what ended it."""
    content: str
    """Without tool calls."""
    calls: tuple[Mapping[str, Any], ...] = ()
    """In OpenAI's form."""

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": list(self.calls)}
        return message


def format_of(chat_template: str | None) -> ToolFormat:
    """How a model writes tool calls, by the markers in its chat template."""
    template = chat_template or ""
    if "<|tool_calls_section_begin|>" in template:
        return "kimi"
    if "<tool_call>" in template:
        return "hermes"
    return "llama" if _LLAMA in template or "<|eom_id|>" in template else "json"


def read(text: str, style: ToolFormat, *, id: str) -> Said:
    """Take the tool calls out of a turn; what is no whole call stays text.

    Args:
        text: What the model wrote, special tokens included.
        style: How it marks calls.
        id: Begins the id of each call, which must be the same whenever the turn is read.

    Example:
        >>> read('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "hermes", id="7-0").calls[0]["id"]
        'call-7-0-0'
    """
    content, calls = _READERS[style](text)
    if not calls:
        return Said(text=text, content=text)
    listed = tuple(
        {"id": f"call-{id}-{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    )
    return Said(text=text, content=content.strip(), calls=listed)


def _hermes(text: str) -> tuple[str, list[Call]]:
    found = [(match, _call(match[1])) for match in _HERMES.finditer(text)]
    if not found or any(call is None for _, call in found):
        return text, []
    return _HERMES.sub("", text), [call for _, call in found if call is not None]


def _kimi(text: str) -> tuple[str, list[Call]]:
    calls = []
    for match in _KIMI.finditer(text):
        name = match[1].removeprefix("functions.").partition(":")[0]
        if _object(match[2]) is None or not name:
            return text, []
        calls.append((name, match[2]))
    return (_KIMI_SECTION.sub("", text), calls) if calls else (text, [])


def _llama(text: str) -> tuple[str, list[Call]]:
    before, marker, after = text.partition(_LLAMA)
    said = after if marker else text
    calls = [_call(part) for part in said.split(";")] if said.lstrip().startswith("{") else [None]
    return (before if marker else "", [call for call in calls if call]) if all(calls) else (text, [])


def _json(text: str) -> tuple[str, list[Call]]:
    thought = _THOUGHT.match(text)
    said = text[thought.end() :] if thought else text
    call = _call(said.strip())
    return (text[: len(text) - len(said)], [call]) if call else (text, [])


_READERS: Mapping[ToolFormat, Callable[[str], tuple[str, list[Call]]]] = {
    "hermes": _hermes,
    "kimi": _kimi,
    "llama": _llama,
    "json": _json,
}


def _call(text: str) -> Call | None:
    """`{"name": ..., "arguments" or "parameters": {...}}`, or None if it is no such object."""
    said = _object(text)
    if said is None or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", said.get("parameters", {}))
    return (said["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a character can be spelt, but neither sent nor tokenized
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
