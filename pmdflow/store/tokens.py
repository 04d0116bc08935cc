"""Token ids as the int32 that the store keeps: an id that does not fit is refused, never wrapped."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pmdflow.types import Int32

TOKEN = np.dtype("<i4")
"""Ids on the wire and in the log."""
_LARGEST = int(np.iinfo(TOKEN).max)


def token_ids(tokens: ArrayLike, *, of: str) -> Int32:
    """`tokens` as contiguous int32; `of` says whose they are.

    Raises:
        ValueError: an id is negative, larger than int32 or no whole number.
    """
    given = np.asarray(tokens)
    if given.size == 0:
        return np.empty(0, TOKEN)
    if given.dtype.kind not in "iu":
        raise ValueError(f"{of}: token ids of type {given.dtype}; give whole numbers")
    for extreme in (given.min(), given.max()):
        if not 0 <= extreme <= _LARGEST:
            raise ValueError(f"{of}: token id {extreme} is outside 0 to {_LARGEST}")
    return np.ascontiguousarray(given, TOKEN)
