"""Turns of a trajectory, from the places of its generated tokens: what the environment said lies between them."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from pmdflow.types import Int32, Int64


def turn_numbers(generated: Int64) -> Int32:
    """The turn of each generated token from their places in a trajectory: a gap ends one."""
    return np.cumsum(np.diff(generated, prepend=generated[:1]) > 1, dtype=np.int32)


def turn_keys(tokens: Int32, start: int, generated: Int64) -> Int64:
    """A hash of the tokens between each turn and the one before, or the beginning of the trajectory at `start` [P]."""
    first = np.flatnonzero(np.diff(generated, prepend=generated[:1] - 2) > 1)
    after = np.concatenate([[start], generated[first[1:] - 1] + 1]) if len(first) else first
    said = [tokens[a:b].tobytes() for a, b in zip(after, generated[first], strict=True)]
    keys = [int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True) for text in said]
    return np.repeat(np.array(keys, np.int64), np.diff(first, append=len(generated)))
