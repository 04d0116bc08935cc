"""Spans: what an actor did, and when; kept in memory until the driver drains them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pmdflow.metrics.report import Event

Work = Literal[
    "generate", "apply_weights", "reference", "step", "publish", "checkpoint", "offload", "start", "score", "archive",
]  # fmt: skip
"""What an actor does in a span: a rollout actor generates and applies weights; a learner recomputes reference
log-probs, takes steps, publishes and writes checkpoints; either moves its memory to the host and back where they take
turns with a device; the reward actor starts its subprocesses and scores; the archive actor archives; a scorer actor
starts and scores likewise, and tells the tokens that it read."""
Wait = Literal[
    "wait_lease", "wait_grant", "wait_environment", "wait_claim", "wait_controller", "wait_unscored", "wait_groups",
    "wait_weights", "wait_device", "wait_evaluation",
]  # fmt: skip
"""What an actor waits for in a bubble: a rollout actor for a lease, for more tokens under those it has, for an
environment, for weights where those that it should begin with are lost, or for its part in an evaluation to be over,
whose answers it generates meanwhile; a learner for its claim, or for the controller while it holds one; either of them
for its turn with the device; the reward actor for unscored trajectories; the controller for ready groups. Each begins
with `wait_`, and no work does."""
SpanName = Work | Wait
"""Every name that an actor gives a span. Runs made before `wait_groups` call the controller's wait `wait_claim` too."""


def is_bubble(name: str) -> bool:
    """Whether spans of this name are waiting, also of names that older versions gave."""
    return name.startswith("wait_")


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
        self._told = 0

    @property
    def dropped(self) -> int:
        """Spans dropped since the buffer was made."""
        return self._dropped

    @contextmanager
    def span(self, name: SpanName, **attrs: Any) -> Iterator[dict[str, Any]]:
        """Record the body's time; what the body puts into the yielded dictionary becomes attributes."""
        start = self._clock()
        try:
            yield attrs
        finally:
            self.add(name, start, self._clock(), **attrs)

    def add(self, name: SpanName, start: float, end: float, **attrs: Any) -> None:
        """Record a span of unix seconds `start` to `end`."""
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

    def losses(self) -> list[Event]:
        """An event if spans were dropped since the last call: a time line does not lose any without a word."""
        with self._lock:
            lost, self._told = self._dropped - self._told, self._dropped
        what = f"{self.actor}: its {lost} oldest spans were dropped before they were asked for; its time line has a gap"
        return [Event(kind="spans_dropped", message=what, attrs={"actor": self.actor, "spans": lost})] if lost else []
