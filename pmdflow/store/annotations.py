"""What scorers add to complete trajectories: columns, kept like those that came with the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmdflow import _rust_buffer
from pmdflow.store.columns import Columns, encoded
from pmdflow.store.metadata import unpack_metadata
from pmdflow.types import Float32, Int32, UInt8


@dataclass(frozen=True, slots=True, kw_only=True)
class Unannotated:
    """A complete trajectory that a scorer has not seen."""

    trajectory: int
    attempt: int
    """Of the scoring that fails if this one does."""
    metadata: Mapping[str, Any]
    prompt: Int32
    tokens: Int32
    """After the prompt, in the order in which they came, of all branches [S]."""
    observed: UInt8
    """1 where the environment made the token [S]."""
    temperatures: Float32
    """[S]"""
    forks: tuple[tuple[int, int, int], ...]
    """Branch, where it begins among the tokens, and how many it keeps of the history before it."""

    def branches(self) -> list[tuple[Int32, Int32]]:
        """Of each branch the places of its tokens among all [n], its own last, and of these those generated in it."""
        ends = [*(start for _, start, _ in self.forks), len(self.tokens)]
        history, found = np.arange(ends[0]), []
        for number, end in enumerate(ends):
            own = np.arange(self.forks[number - 1][1] if number else 0, end)
            if number:
                history = np.concatenate([history[: self.forks[number - 1][2]], own])
            found.append((history.astype(np.int32), own[self.observed[own] == 0].astype(np.int32)))
        return found


class Annotations:
    """That part of `TrajectoryStore`."""

    _native: _rust_buffer.TrajectoryStore

    def unannotated(
        self, scorer: str, max_items: int, ttl_s: float, timeout_s: float, *, now_s: float | None = None
    ) -> list[Unannotated]:
        """Complete trajectories that a scorer has not seen; each is handed out again only after `ttl_s` or a restart.

        Raises:
            Conflict: the scorer is not among the `scorers` of the store.
        """
        return [_unannotated(row) for row in self._native.unannotated(scorer, max_items, ttl_s, timeout_s, now_s)]

    def annotate(
        self, trajectory: int, scorer: str, columns: Columns, *, wait: bool = True, now_s: float | None = None
    ) -> None:
        """Add a scorer's columns to a complete trajectory, each with a value for every token after the prompt.

        What a scorer has added stands: a repeat changes nothing, nor does a call for what is gone or came too late.
        Once all `scorers` of the store have added theirs, the trajectory is handed out for its reward. Without `wait`
        it answers before that is durable.

        Raises:
            Conflict: not complete, in a claim, or a column that there is already.
            ValueError: a column has not one number for each token.
        """
        given = []
        for name, values in columns.items():
            array = np.asarray(values)
            kept = encoded(name, array, tokens=len(array), of=f"trajectory {trajectory}") if array.size else None
            dtype = np.dtype(array.dtype).newbyteorder("<").str
            given.append((name, dtype, b"") if kept is None else (name, kept[0], kept[1].tobytes()))
        self._native.annotate(trajectory, scorer, given, wait, now_s)


def _unannotated(row: Mapping[str, Any]) -> Unannotated:
    segments = row["segments"]
    return Unannotated(
        trajectory=row["trajectory"],
        attempt=row["attempts"],
        metadata=unpack_metadata(row["metadata"]),
        prompt=np.frombuffer(row["prompt"], "<i4"),
        tokens=np.frombuffer(row["tokens"], "<i4"),
        observed=np.frombuffer(row["observed"], np.uint8),
        temperatures=np.repeat(
            np.array([temperature for _, _, temperature, _ in segments], np.float32),
            [length for length, *_ in segments],
        ),
        forks=tuple(row["forks"]),
    )
