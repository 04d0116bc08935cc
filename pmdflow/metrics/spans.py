"""Spans: what an actor did, and when; kept in memory until the driver drains them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SpanBuffer:
    """A bounded, thread-safe buffer of the spans of one actor.

    Example:
        >>> spans = SpanBuffer("rollout-0")
        >>> with spans.span("generate", version=3):
        ...     pass
        >>> [span["name"] for span in spans.drain()]
        ['generate']
    """

    def __init__(self, actor: str, *, capacity: int = 8192, clock: Callable[[], float] = time.time) -> None:
        """Make an empty buffer.

        Args:
            actor: Name of the actor, for example `rollout-0`; its lane in the dashboard.
            capacity: Spans kept; beyond it the oldest are dropped and counted.
            clock: Unix time in seconds.
        """
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}: a span buffer holds at least 1 span")
        self.actor = actor
        self._clock = clock
        self._lock = threading.Lock()
        self._spans: deque[dict[str, Any]] = deque(maxlen=capacity)
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Spans dropped since the buffer was made."""
        return self._dropped

    @contextmanager
    def span(self, name: str, **attrs: Any) -> Iterator[dict[str, Any]]:
        """Record the body's time; what the body puts into the yielded dictionary becomes attributes."""
        start = self._clock()
        try:
            yield attrs
        finally:
            self.add(name, start, self._clock(), **attrs)

    def add(self, name: str, start: float, end: float, **attrs: Any) -> None:
        """Record a span of unix seconds `start` to `end`; names that begin with `wait_` are bubbles."""
        span = {"actor": self.actor, "name": name, "start": start, "end": max(start, end), "attrs": attrs}
        with self._lock:
            if len(self._spans) == self._spans.maxlen:
                self._dropped += 1
            self._spans.append(span)

    def drain(self) -> list[dict[str, Any]]:
        """Return the spans since the last call, oldest first, as lines of `spans.jsonl`."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        return spans
