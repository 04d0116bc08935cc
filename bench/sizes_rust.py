"""The little of Rust's grammar that `sizes.py` needs: where functions begin and end, and which room uses which."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath

_NO_CODE = re.compile(
    r"""//[^\n]*|/\*.*?\*/|b?r(?P<hashes>\#*)".*?"(?P=hashes)|b?"(?:\\.|[^"\\])*"|b?'(?:\\.[^']*|[^'\\\n])'""",
    re.DOTALL,
)
_FUNCTION = re.compile(r"\bfn\s+(\w+)")
_TESTS = re.compile(r"#\[cfg\((?:test|all\(test[^\]]*)\)\]\s*mod\s+\w+\s*\{")
_USE = re.compile(r"\bcrate::(\w+)|\bcrate::\{([^;]*)\}")


def rust_source(text: str) -> str:
    """The code with comments, strings and inline test modules blanked; every line keeps its number."""
    code = _NO_CODE.sub(_blank, text)
    while tests := _TESTS.search(code):
        end = _end_of_block(code, tests.end() - 1)
        code = code[: tests.start()] + _blank_text(code[tests.start() : end]) + code[end:]
    return code


def rust_functions(code: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, lines) of every function with a body."""
    for found in _FUNCTION.finditer(code):
        start = found.start()
        opening = _body(code, found.end())
        if opening is not None:
            first = code.count("\n", 0, start) + 1
            last = code.count("\n", 0, _end_of_block(code, opening) - 1) + 1
            yield found[1], first, last - first + 1


def rust_rooms(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The rooms that each room uses; a room is a folder or a file of `src/`, named in the paths `crate::ROOM`."""
    rooms = {PurePath(name).parts[0].removesuffix(".rs") for name in sources} - {"lib"}
    edges: dict[str, set[str]] = {room: set() for room in rooms}
    for name, code in sources.items():
        room = PurePath(name).parts[0].removesuffix(".rs")
        if room in rooms:
            for single, several in _USE.findall(code):
                edges[room] |= ({single} | set(_first_names(several))) & rooms - {room}
    return edges


def _first_names(tree: str) -> Iterator[str]:
    """The first name of each path in `a::b, c::{d, e}`."""
    depth, name = 0, ""
    for letter in f"{tree},":
        if letter == "," and depth == 0:
            yield name.split("::")[0].strip()
            name = ""
            continue
        depth += (letter == "{") - (letter == "}")
        name += letter


def _body(code: str, position: int) -> int | None:
    """Where the body of the function at `position` opens; None for a declaration."""
    depth = 0
    for index in range(position, len(code)):
        letter = code[index]
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and letter in "{;":
            return index if letter == "{" else None
    return None


def _end_of_block(code: str, opening: int) -> int:
    """One past the brace that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(code)):
        depth += (code[index] == "{") - (code[index] == "}")
        if depth == 0:
            return index + 1
    return len(code)


def _blank(match: re.Match[str]) -> str:
    return _blank_text(match[0])


def _blank_text(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)
