"""What a rollout actor tells of itself: spans of generation, tokens, and problems of what its trajectories talk to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from pmdflow.metrics.report import ActorReport, Event
from pmdflow.metrics.spans import SpanBuffer, SpanName
from pmdflow.rollout.engine import RolloutEngine

MAX_PROBLEMS = 20
"""Problems of environments kept between two drains."""
SPAN_S = 1.0
"""Longest span of generation, so that a live timeline grows."""


class Telling:
    """Counts what is generated, by the generating thread; another one drains it.

    Example:
        >>> telling = Telling(SpanBuffer("rollout-0"), engine, room="environment", context=lambda: 0)
        >>> telling.begin_step()
        >>> telling.end_step(holder.step())
        >>> telling.end_span()
    """

    def __init__(self, spans: SpanBuffer, engine: RolloutEngine, *, room: str, context: Callable[[], int]) -> None:
        """Nothing is generated yet.

        Args:
            spans: Where spans go.
            engine: What generates.
            room: What trajectories talk to, the first word of its events' kinds.
            context: Counts the tokens in the contexts of what is generated now.
        """
        self._spans = spans
        self._engine = engine
        self._room = room
        self._count_context = context
        self._problems: deque[Event] = deque(maxlen=MAX_PROBLEMS)
        self.notes: deque[Event] = deque(maxlen=MAX_PROBLEMS)
        """What environments and agent programs did that is to be known, since the last drain."""
        self.evaluates = False
        """Whether what is generated are answers of an evaluation, which is a bubble of training."""
        self._generated = self._evaluated = 0
        self._start: float | None = None
        self._steps = self._tokens = self._prefilled = self._context = 0

    def keep(self, tokens: int) -> None:
        """So many tokens were generated."""
        self._generated += tokens
        self._evaluated += tokens if self.evaluates else 0

    def begin_step(self) -> None:
        """The engine is about to step."""
        if self._start is None:
            self._start, self._steps, self._tokens = time.time(), 0, 0
            self._prefilled, self._context = self._engine.prefill_tokens, self._count_context()

    def end_step(self, tokens: int) -> None:
        """It has, and generated so many tokens."""
        self.keep(tokens)
        self._steps += 1
        self._tokens += tokens
        if self._start is not None and time.time() - self._start > SPAN_S:
            self.end_span()

    def end_span(self) -> None:
        """Something else than generation follows."""
        if self._start is not None:
            did = {
                "steps": self._steps,
                "tokens": self._tokens,
                "context": (self._context + self._count_context()) // 2,
                "prefilled": self._engine.prefill_tokens - self._prefilled,
            }
            name: SpanName = "wait_evaluation" if self.evaluates else "generate"
            self._spans.add(name, self._start, time.time(), version=self._engine.version, **did)
            self._start = None

    def failed(self, problem: str, **attrs: Any) -> None:
        """An environment or a program failed."""
        self._problems.append(self._event("failed", problem, attrs))

    def ended(self, why: str, **attrs: Any) -> None:
        """A trajectory was ended by a limit of what it talks to."""
        self.notes.append(self._event("ended", why, attrs))

    def _event(self, what: str, message: str, attrs: dict[str, Any]) -> Event:
        return Event(kind=f"{self._room}_{what}", message=message, attrs={"actor": self._spans.actor, **attrs})

    def drain(self, counts: Mapping[str, int]) -> ActorReport:
        """Spans and problems of environments since the last call; counts of tokens, and `counts`, since the start."""
        problems = [self._problems.popleft() for _ in range(len(self._problems))]
        told = [self.notes.popleft() for _ in range(len(self.notes))]
        return ActorReport(
            spans=self._spans.drain(),
            events=[*problems, *told, *self._spans.losses()],
            tokens={
                "generated_tokens": self._generated,
                "evaluation_tokens": self._evaluated,
                "prefill_tokens": self._engine.prefill_tokens,
                "overrun_tokens": self._engine.overrun_tokens,
                "preemptions": self._engine.preemptions,
                "drafted_tokens": self._engine.drafted_tokens,
                "accepted_tokens": self._engine.accepted_tokens,
                **counts,
            },
        )
