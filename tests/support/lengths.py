"""A reward function that needs no task."""

from __future__ import annotations


def longer(*, completion: str) -> float:
    """Characters."""
    return float(len(completion))


def fails(*, completion: str) -> float:
    """Has no answer."""
    raise RuntimeError("the judge is away")
