"""Prompts of `.jsonl` files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import msgpack

from pmdflow.data.sampling import check_overrides
from pmdflow.data.tokenizer import Tokenize
from pmdflow.types import Prompt


class JsonlPrompts:
    """Prompts of a `.jsonl` file: `prompt` on each line, every other key is metadata; blank lines are skipped.

    The key `sampling` overrides how the prompt is sampled, see `pmdflow.data.sampling`.

    The last `num_held_out` lines are held out; earlier lines with the text of one of them are not trained on.
    Each epoch goes once through the others in an order drawn from the seed and the epoch.
    """

    def __init__(self, *, path: Path, seed: int, num_held_out: int, tokenize: Tokenize) -> None:
        """Read the whole file; see `make_prompts` for what it raises."""
        self._path, self._seed, self._tokenize = path, seed, tokenize
        rows = list(_read_jsonl(path))
        split = max(len(rows) - num_held_out, 0)
        self._held_out = rows[split:]
        texts = {text for _, text, _ in self._held_out}
        self._train = [row for row in rows[:split] if row[1] not in texts]
        for training, checked in ((True, self._train), (False, self._held_out)):
            for number, _, metadata in checked:
                _check_sampling(path, number, metadata, training=training)
        if not self._train:
            raise ValueError(
                f"{path} has {len(rows)} prompts, of which none is left for training when the last "
                f"{num_held_out} are held out; add prompts or lower eval.prompts"
            )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def prompt(self, cursor: int) -> Prompt:
        """See `PromptSource`."""
        assert cursor >= 0, cursor
        epoch, position = divmod(cursor, len(self._train))
        return _jsonl_prompt(self._path, self._train[self._order(epoch)[position]], self._tokenize)

    def held_out(self, n: int) -> list[Prompt]:
        """See `PromptSource`."""
        assert 0 <= n <= len(self._held_out), (n, len(self._held_out))
        return [_jsonl_prompt(self._path, row, self._tokenize) for row in self._held_out[:n]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._train)))
        random.Random(f"pmdflow-epoch-{self._seed}-{epoch}").shuffle(order)
        return order


def read_prompts(path: Path, tokenize: Tokenize) -> list[Prompt]:
    """Every prompt of a `.jsonl` file, in its order, for evaluation.

    Raises:
        ValueError: a malformed line (`file:line: cause`), or no prompt.
    """
    rows = list(_read_jsonl(path))
    if not rows:
        raise ValueError(f"{path} holds no prompt; give each line a key prompt")
    for number, _, metadata in rows:
        _check_sampling(path, number, metadata, training=False)
    return [_jsonl_prompt(path, row, tokenize) for row in rows]


def _jsonl_prompt(path: Path, row: tuple[int, str, dict[str, Any]], tokenize: Tokenize) -> Prompt:
    number, text, metadata = row
    return Prompt(id=f"{path.stem}-{number}", text=text, tokens=tokenize(text), metadata=metadata)


def _check_sampling(path: Path, number: int, metadata: Mapping[str, Any], *, training: bool) -> None:
    try:
        check_overrides(metadata, training=training)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (line number, prompt, metadata)."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.task: cannot read {path}: {error}") from error
    for number, line in zip(count(1), lines, strict=False):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a {type(row).__name__}, not an object with a key prompt")
        text = row.pop("prompt", None)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}:{number}: prompt is {text!r:.80}, not a text; every line needs one")
        try:
            msgpack.packb([text, row])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}:{number}: cannot be stored: {error}") from error
        yield number, text, row
