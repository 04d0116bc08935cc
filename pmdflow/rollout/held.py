"""What a rollout actor knows of a trajectory that it holds a lease for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pmdflow.data.sampling import SamplingControl
from pmdflow.rollout.engine import Output, Request
from pmdflow.rollout.repetition import RepetitionDetector
from pmdflow.rollout.stop_text import StopText
from pmdflow.rollout.turns import Reply, Session
from pmdflow.types import Lease, Segment, StopReason

Phase = Literal["waiting", "generating", "ended", "calling", "answered"]
"""Where a turn stands: before or in the engine; ended, not durable; with the environment; answered, not sent."""


@dataclass(slots=True)
class HeldTrajectory:
    """A leased trajectory. The engine holds it only while it generates."""

    lease: Lease
    control: SamplingControl
    limit: int
    """Tokens that the engine may still generate."""
    context: list[int]
    """Everything after the prompt: generated and observed, under this lease and before."""
    stop_text: StopText | None = None
    """Watches the turn for stop strings; None if there are none."""
    repetition: RepetitionDetector | None = None
    """Watches for loops; None if they are let go on."""
    session: Session | None = None
    """Its environment; None if it is a single answer."""
    phase: Phase = "waiting"
    turn_start: int = 0
    """Where the present turn begins in `context`."""
    offset: int = 0
    """Tokens after the prompt already sent to the store."""
    tokens: list[int] = field(default_factory=list)
    """Generated and not yet sent."""
    logprobs: list[float] = field(default_factory=list)
    observed: list[int] = field(default_factory=list)
    """The environment's answer, not yet sent."""
    stop: StopReason | None = None
    closed: bool = False
    """Its end has been sent."""

    @property
    def room(self) -> int:
        """Tokens until the trajectory's own maximum."""
        return self.control.max_tokens - len(self.context)

    @property
    def urgent(self) -> bool:
        """The environment, or the trajectory's next turn, waits for what is unsent."""
        return self.stop is None and (self.phase == "answered" or (self.phase == "ended" and bool(self.tokens)))

    def begin(self) -> Request:
        """What the engine is asked to generate, from now on."""
        self.phase = "generating"
        return Request(
            id=self.lease.trajectory,
            tokens=np.concatenate([self.lease.prompt, np.asarray(self.context, np.int32)]),
            limit=self.limit,
            remaining=self.room,
            temperature=self.control.temperature,
            top_p=self.control.top_p,
            min_tokens=max(self.control.min_tokens - len(self.context), 0),
            stop_token_ids=self.control.stop_token_ids,
        )

    def take(self, output: Output) -> int:
        """Take what the engine generated; returns how many of the tokens are kept.

        A stop ends the trajectory, or its turn if it has an environment that can still answer.
        """
        end = self.stop_text.find(output.tokens) if self.stop_text is not None else None
        count = len(output.tokens) if end is None else end + 1
        self.tokens.extend(output.tokens[:count])
        self.logprobs.extend(output.logprobs[:count])
        self.context.extend(output.tokens[:count])
        self.limit -= count
        stop = output.stop if end is None else "stop"
        if stop == "stop" and self.session is not None and self.room > 0:
            self.phase = "ended"
        else:
            self.stop = stop
        return count

    def answer(self, reply: Reply) -> None:
        """Take the environment's answer; one that is too long for the trajectory is cut and ends it."""
        observed = list(reply.tokens[: self.room])
        self.context += observed
        self.observed = observed
        if observed:
            self.turn_start = len(self.context)
        if reply.done:
            self.stop = "stop"
        elif self.room == 0:
            self.stop = "length"
        self.phase = "answered" if observed or self.stop is not None else "waiting"

    def end_repetition(self) -> bool:
        """Whether the unsent tokens make it repetitive; it then ends at the token with which it became so."""
        if self.repetition is None or self.stop is not None or not self.tokens:
            return False
        end = self.repetition.find(self.tokens)
        if end is None:
            return False
        del self.context[len(self.context) - len(self.tokens) + end + 1 :]
        del self.tokens[end + 1 :], self.logprobs[end + 1 :]
        self.stop = "repetition"
        return True

    def segment(self, *, version: int, next_version: int) -> Segment:
        """Everything unsent, of which nothing is unsent afterwards: either generated or observed; never both."""
        assert not (self.tokens and self.observed)
        tokens, observed = self.observed or self.tokens, bool(self.observed)
        segment = Segment(
            trajectory=self.lease.trajectory,
            epoch=self.lease.epoch,
            offset=self.offset,
            version=version,
            temperature=self.control.temperature,
            tokens=np.asarray(tokens, dtype=np.int32),
            logprobs=np.asarray([] if observed else self.logprobs, dtype=np.float32),
            next_version=next_version,
            stop=self.stop,
            observed=observed,
        )
        self.offset += len(tokens)
        self.closed = self.stop is not None
        self.tokens, self.logprobs, self.observed = [], [], []
        return segment
