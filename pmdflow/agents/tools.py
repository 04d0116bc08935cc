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

_HERMES = ("<tool_call>", "</tool_call>")
_OBJECT = re.compile(r"\s*\{")
_KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
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
    # A model may loop: whatever it writes is read in linear time, which a pattern with two ends would not be.
    first, last = _HERMES
    content, calls, at = "", list[Call](), 0
    while (begin := text.find(first, at)) >= 0:
        end = text.find(last, begin)
        end = len(text) if end < 0 else end  # the last call may lack its end
        while not _OBJECT.match(text, begin + len(first), end) and (later := text.find(first, begin + 1, end)) >= 0:
            begin = later
        body, after = text[begin + len(first) : end].strip(), end + len(last)
        if body.startswith("{") and body.endswith("}"):
            call = _call(body)
            if call is None:
                return text, []
            calls.append(call)
            content += text[at:begin]
        else:
            content += text[at:after]
        at = after
    return (content + text[at:], calls) if calls else (text, [])


def _kimi(text: str) -> tuple[str, list[Call]]:
    first, middle, last = _KIMI
    calls, at = list[Call](), 0
    while (given := text.find(middle, at)) >= 0 and (end := text.find(last, given)) >= 0:
        begin = text.rfind(first, at, given)
        at = end + len(last)
        if begin < 0:
            continue
        name = text[begin + len(first) : given].strip().removeprefix("functions.").partition(":")[0]
        arguments = text[given + len(middle) : end].strip()
        if _object(arguments) is None or not name:
            return text, []
        calls.append((name, arguments))
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
