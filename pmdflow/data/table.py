"""Prompts of finite data: a split that never leaks, and epochs in an order that depends on seed and epoch alone."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pmdflow.config.sources import ColumnsConfig
from pmdflow.data.jsonl import JsonlRows
from pmdflow.data.messages import prompt_key
from pmdflow.data.parquet import ParquetRows
from pmdflow.data.rows import Rows, Task, digest, read_task
from pmdflow.data.stamp import Stamp
from pmdflow.data.tokenizer import PromptTokenizer
from pmdflow.errors import PromptTooLong
from pmdflow.types import Prompt


class TablePrompts:
    """Prompts of `.jsonl` or `.parquet` files, each row once an epoch.

    The last `num_held_out` rows are held out, and rows that ask the same as one of them are not trained on. The column
    `sampling` overrides how the prompt is sampled, see `pmdflow.data.sampling`.

    Every row is read once when it is made, so that a bad one is found before anything starts; what stays is an index,
    about 30 bytes a row.
    """

    def __init__(
        self,
        *,
        rows: Rows,
        name: str,
        tokenize: PromptTokenizer,
        seed: int = 0,
        num_held_out: int | None = 0,
        columns: ColumnsConfig | None = None,
        stamp: Stamp | None = None,
        skip_long: bool = False,
        on_skip: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Check every row and split them; see `make_prompts` for what it raises.

        Args:
            rows: The data.
            name: Before the number in prompt ids.
            tokenize: For the prompts that are drawn.
            seed: Of the order.
            num_held_out: Rows of the end that are held out; None is all.
            columns: What the columns hold.
            stamp: Added to the metadata of every prompt.
            skip_long: Leave out prompts that are too long, instead of refusing them.
            on_skip: Told once how many were left out.
        """
        self.name, self._rows, self._seed, self._tokenize = name, rows, seed, tokenize
        self._columns, self._stamp = columns or ColumnsConfig(), stamp or Stamp()
        num_held_out = len(rows) if num_held_out is None else num_held_out
        keys, excess = self._read(num_held_out)
        usable = np.flatnonzero(excess == 0).astype(np.uint32)
        if len(usable) < len(rows):
            self._refuse_or_tell(excess, skip_long=skip_long, on_skip=on_skip)
        split = max(len(usable) - num_held_out, 0)
        self._held_out, self._train, self._keys = usable[split:], usable[:split], keys
        self.num_held_out, self.held_out_keys = len(self._held_out), frozenset(keys[self._held_out].tolist())
        self._order = lru_cache(maxsize=2)(self._shuffled)
        self.exclude(self.held_out_keys)

    def exclude(self, keys: Iterable[int]) -> None:
        """Never train on prompts with these keys."""
        out = np.fromiter(keys, np.uint64)
        self._train = self._train[~np.isin(self._keys[self._train], out)]
        self._order.cache_clear()

    def prompt(self, cursor: int) -> Prompt:
        """See `PromptSource`.

        Raises:
            ValueError: none is left to train on.
        """
        assert cursor >= 0, cursor
        if not len(self._train):
            raise ValueError(
                f"{self._rows.paths[0]} has {len(self._rows)} prompts, of which none is left for training when "
                f"{len(self._held_out)} are held out; add prompts or lower eval.prompts"
            )
        return self.at(self.row(cursor))

    @property
    def num_train(self) -> int:
        """Rows to train on."""
        return len(self._train)

    def row(self, number: int) -> int:
        """See `Source`."""
        epoch, position = divmod(number, len(self._train))
        return self._order(epoch)[position]

    def at(self, row: int) -> Prompt:
        """See `Source`."""
        return self._prompt(int(self._train[row]))

    def held_out(self, n: int) -> list[Prompt]:
        """See `PromptSource`."""
        assert 0 <= n <= len(self._held_out), (n, len(self._held_out))
        return [self._prompt(int(index)) for index in self._held_out[:n]]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {"files": [path.name for path in self._rows.paths], "rows": len(self._rows), "sha256": self._digest}

    @property
    def summary(self) -> str:
        """How many prompts there are of which kind."""
        return f"{len(self._rows):,} prompts, {len(self._train):,} to train on, {len(self._held_out):,} held out"

    def _read(self, num_held_out: int) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], np.ndarray[Any, Any]]:
        """Key of every row, and its number of tokens where that is too many."""
        self._digest = digest(self._rows.paths)
        count = len(self._rows)
        keys, excess = np.zeros(count, np.uint64), np.zeros(count, np.int32)
        for index, row in enumerate(self._rows):
            task = self._task(index, row, training=index < count - num_held_out)
            keys[index] = prompt_key(task.prompt)
            try:
                excess[index] = self._tokenize.excess(task.prompt)
            except ValueError as error:
                raise ValueError(f"{self._rows.where(index)}: {error}") from error
        return keys, excess

    def _task(self, index: int, row: dict[str, Any], *, training: bool = False) -> Task:
        try:
            return read_task(row, self._columns, training=training)
        except ValueError as error:
            raise ValueError(f"{self._rows.where(index)}: {error}") from error

    def _refuse_or_tell(self, excess: Any, *, skip_long: bool, on_skip: Callable[[str], None]) -> None:
        longest = int(excess.argmax())
        message = (
            f"{np.count_nonzero(excess):,} of {len(self._rows):,} prompts are longer than data.max_prompt_tokens; the "
            f"longest, {self._rows.where(longest)}, has {excess[longest]:,} tokens"
        )
        if not skip_long:
            raise PromptTooLong(
                f"{message}; raise it as far as the model's positions allow, or set data.skip_long_prompts to leave "
                "them out"
            )
        on_skip(f"{message}; they are left out")

    def _prompt(self, index: int) -> Prompt:
        task = self._task(index, self._rows[index])
        return Prompt(
            id=f"{self.name}-{self._rows.number(index)}",
            text=task.text,
            tokens=self._tokenize(task.prompt),
            metadata=self._stamp.on(task.metadata),
        )

    def _shuffled(self, epoch: int) -> array[int]:
        order = array("I", range(len(self._train)))
        random.Random(f"pmdflow-epoch-{self._seed}-{epoch}").shuffle(order)
        return order


def open_rows(paths: list[Path]) -> Rows:
    """The rows of files of one kind.

    Raises:
        ValueError: they cannot be read, or hold none.
    """
    rows: Rows = ParquetRows(paths) if paths[0].suffix == ".parquet" else JsonlRows(paths)
    if not len(rows):
        raise ValueError(f"{paths[0]} holds no prompt; give each line a key prompt")
    return rows
