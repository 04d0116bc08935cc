"""A YAML file as data plus the place of every key and value, and overrides laid over it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from pmdflow.config.errors import ConfigError, ConfigIssue, KeyPath, Place, dotted

_MERGE_TAG = "tag:yaml.org,2002:merge"


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: `1e-4` is a number; `no`, `012` and `2026-01-01` are strings."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class-level table, replaced


for _tag, _pattern, _first in (
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(0|[1-9][0-9]*)$|^0x[0-9a-fA-F]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$",
        list("-+0123456789."),
    ),
    ("merge", r"^<<$", ["<"]),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


@dataclass(slots=True, kw_only=True)
class Document:
    """What a file says, and where it says it."""

    name: str
    """The file, as the user named it."""
    data: Any
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    duplicates: list[ConfigIssue] = field(default_factory=list)

    def place_of_key(self, path: KeyPath) -> Place:
        """Return where the key at `path` stands, or the nearest key above it."""
        return self._nearest(self.keys, path)

    def place_of_value(self, path: KeyPath) -> Place:
        """Return where the value at `path` stands, or the nearest one above it."""
        return self._nearest(self.values, path)

    def override(self, text: str) -> ConfigIssue | None:
        """Lay `KEY=VALUE` over the data, VALUE parsed as YAML; return what is wrong with it, if anything."""
        place = Place(source=text, is_override=True)
        key, equals, source = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            hint = "write KEY=VALUE, for example `scheduler.max_staleness=4`"
            return ConfigIssue(message="this is not a dotted key, `=` and a value", place=place, hint=hint)
        try:
            value = yaml.load(source, Loader=_CoreLoader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError as error:
            return ConfigIssue(message=f"the value is not YAML: {_problem(error)}", place=place)
        return self._assign(parts, value, place)

    def move_places(self, old: KeyPath, new: KeyPath) -> None:
        """Note that what was written at `old` is now the value of `new`."""
        for places in (self.keys, self.values):
            for path in [path for path in places if path[: len(old)] == old]:
                places[new + path[len(old) :]] = places.pop(path)

    def _assign(self, parts: list[str], value: Any, place: Place) -> ConfigIssue | None:
        if self.data is None:
            self.data = {}
        if not isinstance(self.data, dict):
            return None  # the file as a whole is refused anyway
        container: Any = self.data
        path: KeyPath = ()
        for depth, part in enumerate(parts):
            index: str | int = int(part) if isinstance(container, list) and part.isdecimal() else part
            path = (*path, index)
            if isinstance(container, list) and (isinstance(index, str) or index >= len(container)):
                message = f"`{dotted(path[:-1])}` is a list of {len(container)}, it has no `{part}`"
                return ConfigIssue(message=message, place=place, hint="indices begin at 0")
            if depth == len(parts) - 1:
                container[index] = value
            elif isinstance(container, dict) and container.get(index) is None:
                container[index] = {}
                self._mark(path, place)
            elif not isinstance(container[index], dict | list):
                return ConfigIssue(message=f"`{dotted(path)}` is a value, it has no keys of its own", place=place)
            container = container[index]
        self._forget(path)
        for inner in paths_in(value, path):
            self._mark(inner, place)
        return None

    def _mark(self, path: KeyPath, place: Place) -> None:
        self.keys[path] = self.values[path] = place

    def _forget(self, path: KeyPath) -> None:
        for places in (self.keys, self.values):
            for inner in [known for known in places if known[: len(path)] == path]:
                del places[inner]

    def _nearest(self, places: dict[KeyPath, Place], path: KeyPath) -> Place:
        for end in range(len(path), 0, -1):
            if path[:end] in places:
                return places[path[:end]]
        return Place(source=self.name)


def parse(text: str, *, name: str) -> Document:
    """Read YAML text.

    Args:
        text: The file's content.
        name: The file's path, as errors shall name it.

    Raises:
        ConfigError: It is not YAML; the error names line and column.
    """
    loader = None
    try:
        loader = _CoreLoader(text)  # refuses what is no text
        node = loader.get_single_node()
        document = Document(name=name, data=None)
        if node is not None:
            _record(node, document, text.splitlines(), (), ())
            document.data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = _place(name, mark, text.splitlines()) if mark else Place(source=name)
        raise ConfigError([ConfigIssue(message=f"not YAML: {_problem(error)}", place=place)]) from None
    finally:
        if loader is not None:
            loader.dispose()
    return document


def paths_in(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """List `path` and the path of everything inside `value`."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_in(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_in(inner, (*path, index))


def _record(node: yaml.Node, document: Document, lines: list[str], path: KeyPath, above: tuple[int, ...]) -> None:
    """Note the place of everything under `node`; `above` are the nodes around it, to end at a cyclic alias."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="this alias contains itself", problem_mark=node.start_mark)
    document.values.setdefault(path, _place(document.name, node.start_mark, lines, node.end_mark))
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, inner in enumerate(node.value):
            _record(inner, document, lines, (*path, index), above)
    elif isinstance(node, yaml.MappingNode):
        _record_mapping(node, document, lines, path, above)


def _record_mapping(
    node: yaml.MappingNode, document: Document, lines: list[str], path: KeyPath, above: tuple[int, ...]
) -> None:
    first: dict[str, int] = {}
    merged: list[yaml.Node] = []
    for key, value in node.value:
        if key.tag == _MERGE_TAG:
            merged.extend(value.value if isinstance(value, yaml.SequenceNode) else [value])
            continue
        place = _place(document.name, key.start_mark, lines, key.end_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
        inner = (*path, int(key.value) if key.tag.endswith(":int") else key.value)
        if key.value in first:
            message = f"`{dotted(inner)}` is written twice, first in line {first[key.value]}"
            document.duplicates.append(ConfigIssue(message=message, place=place, hint="keep one of them"))
        first.setdefault(key.value, place.line)
        document.keys.setdefault(inner, place)
        _record(value, document, lines, inner, above)
    for source in merged:  # last, because a key of its own wins over a merged one
        _record(source, document, lines, path, above)


def _place(name: str, start: Any, lines: list[str], end: Any = None) -> Place:
    text = lines[start.line] if start.line < len(lines) else ""
    length = end.column - start.column if end is not None and end.line == start.line else len(text) - start.column
    return Place(source=name, line=start.line + 1, column=start.column + 1, length=max(1, length), text=text)


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
