"""What a reward function may return beside a number: its value, and the answer that it read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

ANSWER = ".answer"
"""Behind the name of a function, that of the component that keeps the keys of its answers."""
_EXACT_BITS = 53
"""Whole numbers that a float64 keeps exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A value, and the answer that was judged, so that a group's answers can be compared at the claim.

    Example:
        >>> Judged(value=1.0, answer="42").answer
        '42'
    """

    value: float
    answer: str | None = None
    """None: the function found none."""


def answer_key(answer: str) -> float:
    """The key that stands for an answer in the store: equal answers have equal keys. A whole number below 2^53."""
    digest = hashlib.blake2b(answer.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> (64 - _EXACT_BITS))
