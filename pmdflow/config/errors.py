"""What is wrong with a configuration: every mistake at once, each with its place and a hint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pmdflow.config.recorded import RENAMED
from pmdflow.config.schema import Config
from pmdflow.config.sources import MIXTURE, ONE_SOURCE
from pmdflow.errors import PmdflowError

KeyPath = tuple[str | int, ...]
"""A key and the keys and list indices above it, for example `("reward", "functions", 0, "weight")`."""

_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a key or value was written: in the file, or in an override of the command line."""

    source: str
    """Path of the file as it was given, or the override's text."""
    line: int = 0
    """From 1; 0 in an override, and for the file as a whole."""
    column: int = 0
    """From 1; 0 like `line`."""
    length: int = 1
    """Characters to underline, at least 1."""
    text: str = ""
    """The source line."""
    is_override: bool = False

    def header(self) -> str:
        """Name the place: `cluster.yaml:12:5`, or the override."""
        if self.is_override:
            return f"override `{self.source}`"
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    def excerpt(self) -> list[str]:
        """Quote the source line with a caret under the place; [] without a line."""
        if not self.line or not self.text.strip():
            return []
        gutter = f"{self.line:>5} | "
        before = re.sub(r"[^\t]", " ", self.text[: self.column - 1])
        room = max(1, len(self.text) - self.column + 1)
        return [gutter + self.text, f"{'':>5} | " + before + "^" * max(1, min(self.length, room))]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigIssue:
    """One mistake."""

    message: str
    place: Place
    hint: str | None = None

    def render(self) -> str:
        """Say where, what, and what to do, in plain text."""
        lines = [f"{self.place.header()}: error: {self.message}", *self.place.excerpt()]
        return "\n".join([*lines, f"hint: {self.hint}"] if self.hint else lines)


class ConfigError(PmdflowError):
    """A configuration cannot be used; carries every mistake that was found, in file order.

    Example:
        >>> place = Place(source="cluster.yaml", line=2, column=3, length=4, text="  nmae: first")
        >>> issue = ConfigIssue(message="unknown key `run.nmae`", place=place, hint="did you mean `name`?")
        >>> print(ConfigError([issue]))
        cluster.yaml:2:3: error: unknown key `run.nmae`
            2 |   nmae: first
              |   ^^^^
        hint: did you mean `name`?
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, issues: Sequence[ConfigIssue]) -> None:
        self.issues = tuple(sorted(issues, key=lambda issue: (issue.place.is_override, issue.place.line)))
        super().__init__(f"{len(issues)} mistakes in a configuration")
        self.args = (self.issues,)  # what a copy in another process is made from

    def __str__(self) -> str:
        """Render all issues, a blank line between two."""
        return "\n\n".join(issue.render() for issue in self.issues)

    def report(self) -> str:
        """Say all issues and their number; each one names its own place."""
        count = len(self.issues)
        return f"{self}\n\n{count} error{'s' if count > 1 else ''}; nothing was started"


def dotted(path: KeyPath) -> str:
    """Write a key path as `reward.functions.0.weight`."""
    return ".".join(str(part) for part in path)


def describe_value(value: object) -> str:
    """Show a value as YAML would, with its type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {str: "string", int: "integer", float: "number"}
    return f"{value!r} ({names.get(type(value), type(value).__name__)})"


def did_you_mean(word: object, candidates: Sequence[str]) -> str | None:
    """Suggest the candidate that is most like `word`, if one is near."""
    near = get_close_matches(str(word), candidates, n=1)
    return f"did you mean `{near[0]}`?" if near else None


def fields_at(path: KeyPath) -> Mapping[str, FieldInfo]:
    """Return the keys allowed at `path`, {} where anything goes or nothing does."""
    model: type[BaseModel] | None = Config
    is_name = False
    for part in path:
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        field = model.model_fields.get(part) if model else None
        model = _model_in(field.annotation) if field else None
        is_name = field is not None and get_origin(field.annotation) is dict
    return model.model_fields if model else {}


def explain(
    error: ValidationError,
    *,
    place_of_key: Callable[[KeyPath], Place],
    place_of_value: Callable[[KeyPath], Place],
    is_written: Callable[[KeyPath], bool],
) -> Iterator[ConfigIssue]:
    """Turn pydantic's errors into located issues.

    Args:
        error: What validation raised.
        place_of_key: Where the key at a path stands; for an absent one, the nearest key above it.
        place_of_value: The same for its value.
        is_written: Whether a path was written at all, rather than left at its default.
    """
    details = [detail | {"loc": _keys(detail["loc"])} for detail in error.errors()]
    misspelt = {_meant(detail["loc"]) for detail in details if detail["type"] == "extra_forbidden"}
    for detail in details:
        path = detail["loc"]
        if detail["type"] == "missing" and path in misspelt:
            continue  # said at the misspelt key
        if not path:
            yield from _explain_combination(detail, place_of_value=place_of_value, is_written=is_written)
        elif detail["type"] in ("missing", "extra_forbidden", "invalid_key"):
            message, hint = _explain_key(detail["type"], path)
            yield ConfigIssue(message=message, place=place_of_key(path), hint=hint)
        else:
            yield ConfigIssue(message=_explain_value(detail), place=place_of_value(path), hint=_value_hint(detail))


def _keys(path: KeyPath) -> KeyPath:
    """The path without what pydantic adds to say which form of a value it tried."""
    return tuple(part for part in path if part not in (ONE_SOURCE, MIXTURE))


def _explain_combination(
    detail: ErrorDetails, *, place_of_value: Callable[[KeyPath], Place], is_written: Callable[[KeyPath], bool]
) -> Iterator[ConfigIssue]:
    if detail["type"] != "value_error":
        message = f"the file must be a mapping of sections, got {describe_value(detail['input'])}"
        yield ConfigIssue(message=message, place=place_of_value(()), hint=_allowed(Config.model_fields))
        return
    for message in str(detail["ctx"]["error"]).splitlines():
        named = [tuple(key.split(".")) for key in re.findall(r"\b[a-z_]+\.[a-z_]+\b", message)]
        path = next((key for key in named if is_written(key)), ())
        text, _, remedy = message.rpartition("; ")
        yield ConfigIssue(message=text or remedy, place=place_of_value(path), hint=remedy if text else None)


def _explain_key(kind: str, path: KeyPath) -> tuple[str, str | None]:
    key, fields = path[-1], fields_at(path[:-1])
    if kind == "missing":
        required = [name for name, inner in fields_at(path).items() if inner.is_required()]
        meaning = f"with {', '.join(required)}" if required else f"({fields[str(key)].description})"
        return f"`{dotted(path)}` is missing", f"add `{key}:` {meaning}"
    if kind == "invalid_key":
        return f"keys must be strings, got {describe_value(key)}", "put it in quotes"
    if dotted(path) in RENAMED:
        return f"unknown key `{dotted(path)}`", f"it is called `{RENAMED[dotted(path)]}` now"
    hint = did_you_mean(key, list(fields))
    owners = [name for name in Config.model_fields if name != path[0] and key in fields_at((name,))]
    if hint is None and owners:
        hint = f"`{key}` belongs to `{owners[0]}`"
    return f"unknown key `{dotted(path)}`", hint or _allowed(fields)


def _explain_value(detail: ErrorDetails) -> str:
    key, kind, got = dotted(detail["loc"]), detail["type"], describe_value(detail["input"])
    context = detail.get("ctx", {})
    if kind in _LIMITS:
        words, limit = _LIMITS[kind]
        return f"`{key}` must be {words} {context[limit]}, got {detail['input']}"
    if kind.removesuffix("_type") in _EXPECTED:
        return f"`{key}` must be {_EXPECTED[kind.removesuffix('_type')]}, got {got}"
    if kind == "literal_error":
        return f"`{key}` must be {context['expected']}, got {got}"
    if kind == "string_pattern_mismatch":
        return f"`{key}` is malformed: {got}"
    return f"`{key}`: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {got}"


def _value_hint(detail: ErrorDetails) -> str | None:
    path = detail["loc"]
    if detail["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        if near := did_you_mean(detail["input"], choices):
            return near
    if detail["type"] == "model_type":
        return _allowed(fields_at(path))
    field = fields_at(path[:-1]).get(str(path[-1]))
    return field.description if field else None


def _meant(path: KeyPath) -> KeyPath | None:
    near = get_close_matches(str(path[-1]), list(fields_at(path[:-1])), n=1)
    return (*path[:-1], near[0]) if near else None


def _allowed(fields: Mapping[str, Any]) -> str | None:
    return f"keys here: {', '.join(fields)}" if fields else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
