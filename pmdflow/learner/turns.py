"""Turns of a trajectory, from the places of its generated tokens: what the environment said lies between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b
from operator import itemgetter

import numpy as np

from pmdflow.types import Float64, Int32, Int64, TurnRow


def turn_numbers(generated: Int64) -> Int32:
    """The turn of each generated token from their places in a trajectory: a gap ends one."""
    return np.cumsum(np.diff(generated, prepend=generated[:1]) > 1, dtype=np.int32)


def turn_keys(tokens: Int32, start: int, generated: Int64, *, said: int = 0, notes: Sequence[TurnRow] = ()) -> Int64:
    """The state in which the turn of each generated token began, as a number.

    It is what was noted between the turn before and this one, and where nothing was, the tokens there.

    Args:
        tokens: All of a claim.
        start: Where the trajectory begins among them.
        generated: The places of its generated tokens there [P].
        said: Where what `notes` count from begins: the end of its prompt.
        notes: What was said of it.
    """
    first = np.flatnonzero(np.diff(generated, prepend=generated[:1] - 2) > 1)
    after = np.concatenate([[start], generated[first[1:] - 1] + 1]) if len(first) else first
    noted = {said + offset: key for _, offset, _, key in notes if key is not None}
    keys = []
    for number, (low, high) in enumerate(zip(after.tolist(), generated[first].tolist(), strict=True)):
        key = noted.get(low if number else said)
        keys.append(_hash(tokens[low:high].tobytes()) if key is None else _hash(key.encode(), person=b"key"))
    return np.repeat(np.array(keys, np.int64), np.diff(first, append=len(generated)))


def turn_rewards(generated: Int64, *, said: int, notes: Sequence[TurnRow]) -> Float64:
    """What each generated token's turn was rewarded with when it was answered [P]; 0 where nothing was said."""
    if not len(generated):
        return np.zeros(0)
    noted = {said + offset: rewards.get("reward", 0.0) for _, offset, rewards, _ in notes}
    first = np.flatnonzero(np.diff(generated, prepend=generated[:1] - 2) > 1)
    ends = np.append(generated[first[1:] - 1], generated[-1]) + 1
    values = np.array([noted.get(int(end), 0.0) for end in ends])
    return np.repeat(values, np.diff(first, append=len(generated)))


def notes_of(turns: Sequence[TurnRow], row: int) -> Sequence[TurnRow]:
    """Those of one trajectory, of notes in the order of their rows."""
    low, high = (bisect_left(turns, at, key=itemgetter(0)) for at in (row, row + 1))
    return turns[low:high]


def _hash(data: bytes, *, person: bytes = b"") -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=person).digest(), "little", signed=True)
