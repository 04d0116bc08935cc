"""Rows of `.jsonl` files, by the offsets of their lines."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any

from pmdflow.errors import PmdflowError


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
        self._looks: list[tuple[int, int]] = []
        self._digests: list[bytes] = []
        for path in self.paths:
            offset, digest = 0, hashlib.sha256()
            try:
                with open(path, "rb") as file:
                    self._looks.append(_look(file))
                    for number, line in enumerate(file, 1):
                        digest.update(line)
                        if not line.isspace():
                            self._offsets.append(offset)
                            self._numbers.append(number)
                        offset += len(line)
            except OSError as error:
                raise ValueError(f"data.task: cannot read {path}: {error}") from error
            self._digests.append(digest.digest())
            self._ends.append(len(self._offsets))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        Raises:
            ValueError: the line is no JSON object.
            PmdflowError: the file has other content by now.
        """
        number = self._file(index)
        with open(self.paths[number], "rb") as file:
            self._require_same(number, file)
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

    def _require_same(self, number: int, file: BufferedReader) -> None:
        """Offsets are of what the file held: another line must not pass for a row."""
        look = _look(file)
        if look == self._looks[number]:
            return
        if hashlib.file_digest(file, "sha256").digest() != self._digests[number]:
            raise PmdflowError(
                f"{self.paths[number]} has changed while the run reads it: what a cursor means would change",
                hint="put it back as it was and run the same command again, or begin a new run with it",
            )
        self._looks[number] = look

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


def _look(file: BufferedReader) -> tuple[int, int]:
    """What changes when somebody writes a file: its size and time of change."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
