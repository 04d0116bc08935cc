"""Rows of `.jsonl` files, by the offsets of their lines."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any


class JsonlRows:
    """Rows of one or several `.jsonl` files, an object on each line; blank lines are skipped. See `Rows`.

    Example:
        >>> rows = JsonlRows([Path("problems.jsonl")])
        >>> len(rows), rows[0], rows.where(0)
        (2, {'prompt': '1 + 1?', 'answer': 2}, 'problems.jsonl:1')
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Find the lines of the files.

        Raises:
            ValueError: a file cannot be read.
        """
        self.paths = tuple(paths)
        self._offsets, self._numbers, self._ends = array("Q"), array("I"), []
        for path in self.paths:
            try:
                with open(path, "rb") as file:
                    offset = 0
                    for number, line in enumerate(file, 1):
                        if not line.isspace():
                            self._offsets.append(offset)
                            self._numbers.append(number)
                        offset += len(line)
            except OSError as error:
                raise ValueError(f"data.task: cannot read {path}: {error}") from error
            self._ends.append(len(self._offsets))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        Raises:
            ValueError: the line is no JSON object.
        """
        with open(self.paths[self._file(index)], "rb") as file:
            file.seek(self._offsets[index])
            return self._parse(index, file.readline())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        indices = count()
        for path in self.paths:
            with open(path, "rb") as file:
                for line in file:
                    if not line.isspace():
                        yield self._parse(next(indices), line)

    def where(self, index: int) -> str:
        """`file:line`."""
        return f"{self.paths[self._file(index)]}:{self._numbers[index]}"

    def number(self, index: int) -> int:
        """The line, of a single file; else the row among all."""
        return self._numbers[index] if len(self.paths) == 1 else index + 1

    def _file(self, index: int) -> int:
        return next(number for number, end in enumerate(self._ends) if index < end)

    def _parse(self, index: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where(index)}: not UTF-8 text: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.where(index)}: a {type(row).__name__}, not an object with a key prompt")
        return row
