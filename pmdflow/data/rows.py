"""Finite data: what a row holds, whatever file it is in, and what becomes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgpack

from pmdflow.config.sources import ColumnsConfig
from pmdflow.data.messages import Chat, parse_chat
from pmdflow.data.sampling import check_overrides


class Rows(Protocol):
    """Rows of one or several files, by index; none is held as Python objects."""

    @property
    def paths(self) -> Sequence[Path]:
        """The files, in order."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every row in order; faster than one by one."""

    def where(self, index: int) -> str:
        """`file:number`, counted from 1."""

    def number(self, index: int) -> int:
        """Number of the row in prompt ids, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt before it is tokenized."""

    prompt: str | Chat
    metadata: dict[str, Any]
    """What its reward functions get."""

    @property
    def text(self) -> str:
        """The prompt as a person reads it."""
        return self.prompt.text if isinstance(self.prompt, Chat) else self.prompt


def read_task(row: Mapping[str, Any], columns: ColumnsConfig, *, training: bool = False) -> Task:
    """Read a row by its columns.

    Chat messages and tools are left in the metadata as `messages` and `tools`: rewards and environments want them.

    Args:
        row: The row.
        columns: What its columns hold.
        training: Refuse sampling overrides that training cannot use, too.

    Raises:
        ValueError: what is wrong with it, without a place.
    """
    rest = dict(row)
    name = columns.prompt or ("prompt" if "prompt" in row or "messages" not in row else "messages")
    prompt = _take(rest, name)
    is_chat = isinstance(prompt, list | tuple) or name == "messages"
    tools = _take(rest, columns.tools or "tools") if columns.tools or is_chat else None
    if not is_chat and (not isinstance(prompt, str) or not prompt.strip()):
        raise ValueError(
            f"{name} is {prompt!r:.80}, not a text; every line needs one, or data.columns says which column it is"
        )
    if tools and not is_chat:
        prompt, is_chat = [{"role": "user", "content": prompt}], True
    chat = parse_chat(prompt, tools) if is_chat else None
    answer = {} if columns.answer is None else {"answer": _take(rest, columns.answer)}
    metadata = (rest if columns.metadata is None else {key: _take(rest, key) for key in columns.metadata}) | answer
    if chat is not None:
        metadata |= {"messages": list(chat.messages)} | ({"tools": list(chat.tools)} if chat.tools else {})
    task = Task(prompt=chat or str(prompt), metadata=metadata)
    _check_plain(task)
    check_overrides(metadata, training=training)
    return task


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the files' contents."""
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _take(row: dict[str, Any], name: str) -> Any:
    """A column, which leaves the row, or what a dotted name reaches inside of one, which stays."""
    if name in row:
        return row.pop(name)
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            if "." not in name and name in ("prompt", "tools"):
                return None
            raise ValueError(f"there is no column {name}: it has {', '.join(row)}; mend data.columns")
        value = value[part]
    return value


def _check_plain(task: Task) -> None:
    try:
        msgpack.packb([task.text, task.metadata])
    except (ValueError, OverflowError, TypeError) as error:
        raise ValueError(
            f"cannot be stored: {error}; name the columns that rewards need in data.columns.metadata"
        ) from error
