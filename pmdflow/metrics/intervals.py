"""Arithmetic on spans: unions, overlaps, shares, and to whom each second belongs."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from pmdflow.metrics.spans import is_bubble

Span = Mapping[str, Any]
Interval = tuple[float, float]
"""(start, end) in seconds."""
UNRECORDED = "unrecorded"


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Merge intervals of any order into disjoint ascending ones."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def clip(spans: Iterable[Span], start: float, end: float) -> list[Interval]:
    """The parts of `spans` inside `start` to `end`."""
    return [(max(span["start"], start), min(span["end"], end)) for span in spans]


def covered_s(intervals: Iterable[Interval]) -> float:
    """Seconds of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def overlap_s(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Seconds that two sets of disjoint ascending intervals have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        low, high = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        total += max(0.0, high - low)
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def busy_share(spans: Iterable[Span], actor_prefix: str, start: float, end: float) -> float | None:
    """Share of `start` to `end` that spans other than bubbles cover, averaged over the actors of the prefix.

    None without such an actor or without time.
    """
    working: defaultdict[str, list[Span]] = defaultdict(list)
    for span in spans:
        if str(span["actor"]).startswith(actor_prefix):
            working[span["actor"]].extend([] if is_bubble(span["name"]) else [span])
    if not working or end <= start:
        return None
    return fmean(covered_s(union(clip(own, start, end))) for own in working.values()) / (end - start)


def overlap_share(spans: Iterable[Span]) -> float | None:
    """Share of the time in learner steps during which some rollout actor was generating."""
    steps, generating = [], []
    for span in spans:
        if span["name"] == "step" and str(span["actor"]).startswith("learner"):
            steps.append((span["start"], span["end"]))
        elif span["name"] == "generate":
            generating.append((span["start"], span["end"]))
    training = union(steps)
    return overlap_s(training, union(generating)) / covered_s(training) if training else None


def longest_wait(spans: Iterable[Span], actor_prefix: str, start: float, end: float) -> str | None:
    """Name of the bubble in which actors of the prefix spent most of `start` to `end`; None without one."""
    total: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        if is_bubble(span["name"]) and str(span["actor"]).startswith(actor_prefix):
            total[span["name"]] += max(0.0, min(span["end"], end) - max(span["start"], start))
    return max(total, key=lambda name: total[name]) if total else None


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
