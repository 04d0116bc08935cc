"""Arithmetic on spans: unions, overlaps, and to whom each second belongs."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pmdflow.types import Float64

Span = Mapping[str, Any]
UNRECORDED = "unrecorded"


def union(intervals: Iterable[tuple[float, float]]) -> Float64:
    """Merge intervals of any order into disjoint ascending ones, shape [M, 2]."""
    pairs = np.array([pair for pair in intervals if pair[1] > pair[0]], dtype=np.float64).reshape(-1, 2)
    if not len(pairs):
        return pairs
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(pairs[:, 1])
    opens = np.concatenate(([True], pairs[1:, 0] > reach[:-1]))
    closes = np.append(np.flatnonzero(opens)[1:] - 1, len(pairs) - 1)
    return np.column_stack((pairs[opens, 0], reach[closes]))


def clip(spans: Iterable[Span], start: float, end: float) -> list[tuple[float, float]]:
    """The parts of `spans` inside `start` to `end`, as (start, end) pairs."""
    return [(max(span["start"], start), min(span["end"], end)) for span in spans]


def covered_s(intervals: Float64) -> float:
    """Seconds of disjoint intervals [M, 2]."""
    return float(np.sum(intervals[:, 1] - intervals[:, 0]))


def overlap_s(first: Float64, second: Float64) -> float:
    """Seconds that two sets of disjoint ascending intervals have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        low, high = max(first[i, 0], second[j, 0]), min(first[i, 1], second[j, 1])
        total += max(0.0, high - low)
        if first[i, 1] < second[j, 1]:
            i += 1
        else:
            j += 1
    return float(total)


def is_bubble(name: str) -> bool:
    """Whether spans of this name are waiting."""
    return name.startswith("wait_")


def seconds_by_name(spans: Iterable[Span], start: float, end: float) -> dict[str, float]:
    """Give each second of one actor to exactly one span name; what no span covers is `unrecorded`.

    Where spans overlap, work comes before waiting, and the latest started (the innermost) before others, so the
    values sum to `end - start`.
    """
    ordered = sorted(
        ((max(span["start"], start), min(span["end"], end), str(span["name"])) for span in spans),
        key=lambda item: item[0],
    )
    ordered = [item for item in ordered if item[1] > item[0]]
    edges = sorted({start, end, *(item[0] for item in ordered), *(item[1] for item in ordered)})
    seconds: defaultdict[str, float] = defaultdict(float)
    active: list[tuple[bool, float, float, str]] = []  # (is bubble, -start, end, name): the owner is the smallest
    following = 0
    for low, high in itertools.pairwise(edges):
        while following < len(ordered) and ordered[following][0] <= low:
            begin, stop, name = ordered[following]
            heapq.heappush(active, (is_bubble(name), -begin, stop, name))
            following += 1
        while active and active[0][2] <= low:
            heapq.heappop(active)
        seconds[active[0][3] if active else UNRECORDED] += high - low
    return dict(seconds)
