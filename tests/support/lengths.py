"""A reward function that needs no task."""

from __future__ import annotations


def longer(*, completion: str) -> float:
    """Characters."""
    return float(len(completion))
