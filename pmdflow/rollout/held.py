"""What a rollout actor knows of a trajectory that it holds a lease for, and the phases that it goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pmdflow.data.sampling import SamplingControl
from pmdflow.data.stop_text import StopText
from pmdflow.environments.protocol import Note, Partner, Reply
from pmdflow.rollout.engine import Output, Request
from pmdflow.rollout.repetition import RepetitionDetector
from pmdflow.types import Lease, Segment, StopReason

Phase = Literal["waiting", "generating", "ended", "calling", "answered", "over", "closed"]

FLUSH_TOKENS = 64
"""Unsent tokens of one trajectory that are sent at once, however large its grant is."""


class LeaseLost(Exception):
    """A lease that has ended before it was taken up."""


@dataclass(slots=True)
class HeldTrajectory:
    """A leased trajectory, in one phase at a time; nothing but its own methods writes the phase.

    | phase      | what is so                                   | left by                                      |
    |------------|----------------------------------------------|----------------------------------------------|
    | waiting    | it may join the engine                       | `begin` -> generating                        |
    | generating | the engine holds it                          | `take` -> ended, over                        |
    | ended      | its turn is whole, perhaps not durable yet   | `resume`, once it is -> calling              |
    | calling    | its environment has the turn                 | `poll` -> answered, waiting (no words), over |
    | answered   | the answer is not durable yet                | `resume`, once it is -> waiting              |
    | over       | it generates no more; its end is unsent      | `segment` -> closed                          |
    | closed     | its end is sent                              | nothing: the lease ends once that is durable |

    It begins as waiting, or by `open` as calling. `resume` without a budget, `end_repetition` and `abort` lead to over.
    """

    lease: Lease
    control: SamplingControl
    limit: int
    """Tokens that the engine may still generate."""
    context: list[int]
    """Everything after the prompt: generated and observed, under this lease and before."""
    stop_text: StopText | None = None
    """Watches the turn for stop strings; None if there are none."""
    repetition: RepetitionDetector | None = None
    """Watches for loops, of an agent within a turn; None if they are let go on."""
    session: Partner | None = None
    """Its environment or agent program; None if it is a single answer."""
    watch: Callable[[Sequence[str], Sequence[int]], StopText] | None = None
    """Makes what watches a turn for stop strings that its program asks for."""
    phase: Phase = field(default="waiting", init=False)
    """Where it stands, by the table above."""
    stop: StopReason | None = field(default=None, init=False)
    """Why it is over; None before."""
    turn_start: int = field(default=0, init=False)
    """Where the present turn begins in `context`."""
    offset: int = field(init=False)
    """Tokens after the prompt already sent to the store."""
    tokens: list[int] = field(default_factory=list, init=False)
    """Generated and not yet sent."""
    logprobs: list[float] = field(default_factory=list, init=False)
    """Of `tokens`."""
    columns: dict[str, list[Any]] = field(default_factory=dict, init=False)
    """Of `tokens` by name, as the engine gives them."""
    observed: list[int] = field(default_factory=list, init=False)
    """The environment's answer, not yet sent."""
    num_observed: int = field(default=0, init=False)
    """Tokens observed under this lease."""
    notes: list[Note] = field(default_factory=list, init=False)
    """What was said of it and is not sent yet."""
    epoch: int = field(init=False)
    """Fencing epoch of the newest branch."""
    left_out: int = field(default=0)
    """Tokens of the episode that its newest branch has not."""
    fork: int | None = field(default=None, init=False)
    """A branch is to be begun in the store, with so many tokens after the prompt, before anything else is sent."""

    def __post_init__(self) -> None:
        self.offset, self.epoch = len(self.context), self.lease.epoch

    @property
    def id(self) -> int:
        """Of the trajectory, in the store and in the engine."""
        return self.lease.trajectory

    @property
    def allowed(self) -> int:
        """Tokens that the engine may generate now: of the grant, and of what the program has asked for."""
        asked = None if self.session is None else self.session.limit
        return self.limit if asked is None else min(self.limit, max(asked, 0))

    @property
    def room(self) -> int:
        """Tokens until the trajectory's own maximum."""
        return self.control.max_tokens - len(self.context) - self.left_out

    @property
    def min_tokens(self) -> int:
        """Tokens from now on before which it cannot end."""
        return max(self.control.min_tokens - len(self.context), 0)

    @property
    def urgent(self) -> bool:
        """What is unsent is to be sent at once: somebody waits for it, it is half of the grant, or it is much.

        The other half is generated while the store makes it durable.
        """
        if self.phase == "over" or self.observed or len(self.tokens) >= FLUSH_TOKENS:
            return True
        half_used = len(self.tokens) >= self.limit < self.room
        return bool(self.tokens) and (self.phase == "ended" or half_used)

    @property
    def call(self) -> Future[Any] | None:
        """The call of the environment that goes on."""
        return self.session.call if self.session is not None and self.phase == "calling" else None

    def open(self, session: Partner, *, unanswered: int, whole: bool) -> None:
        """Begin with an environment, whose record is replayed.

        Args:
            session: The environment, not called yet.
            unanswered: Tokens at the end of `context` that it has not answered.
            whole: They are a turn that has ended, which it answers now.
        """
        self.session = session
        self.turn_start = len(self.context) - unanswered
        self._call(self.context[self.turn_start :] if whole else None)

    def attach(self, session: Partner, *, turn: Sequence[int] | None, whole: bool) -> None:
        """Go on with what lives: it waits for `turn`, and more if that is not `whole`; None: for nothing."""
        self.session = session
        self.turn_start = len(self.context) - len(turn or ())
        if turn is None:
            self.phase = "calling"
        elif whole:
            self._call(turn)
        elif session.outlives:
            self._begin_turn()

    def begin(self) -> Request:
        """What the engine is asked to generate, from now on."""
        self.phase = "generating"
        return Request(
            id=self.id,
            tokens=np.concatenate([self.lease.prompt, np.asarray(self.context, np.int32)]),
            limit=self.allowed,
            remaining=self.room,
            temperature=self.control.temperature,
            top_p=self.control.top_p,
            min_tokens=self.min_tokens,
            stop_token_ids=self.control.stop_token_ids,
        )

    def take(self, output: Output, *, version: int) -> int:
        """Take what the engine generated under `version`; returns how many of the tokens are kept.

        A stop ends the trajectory, or its turn if it has an environment that can still answer.
        """
        end = self.stop_text.find(output.tokens) if self.stop_text is not None else None
        count = len(output.tokens) if end is None else end + 1
        self.tokens.extend(output.tokens[:count])
        self.logprobs.extend(output.logprobs[:count])
        for name, values in (output.columns or {}).items():
            self.columns.setdefault(name, []).extend(values[:count])
        self.context.extend(output.tokens[:count])
        self.limit -= count
        stop = output.stop if end is None else "stop"
        if self.session is not None:
            self.session.generated(output.logprobs[:count], version)
            stop = "length" if stop is None and self.session.limit == 0 else stop
        if stop is not None and self.session is not None and (self.room > 0 or self.session.outlives):
            self.phase = "ended"
        elif stop is not None:
            self._end(stop)
        return count

    def poll(self) -> Reply | None:
        """Take the environment's answer if it is there; one too long for the trajectory is cut and ends it."""
        if self.session is None or self.stop is not None:
            return None
        interrupted = self.session.over and self.phase in ("waiting", "generating", "ended")
        reply = self.session.poll() if self.phase == "calling" or interrupted else None
        if reply is None:
            return None
        if reply.fork is not None:
            self.left_out += len(self.context) - reply.fork
            del self.context[reply.fork :]
            self.offset = self.fork = reply.fork
        self.notes += [] if reply.note is None else [reply.note]
        self.observed = list(reply.tokens[: self.room])
        self.context += self.observed
        self.num_observed += len(self.observed)
        if self.observed or reply.turn is not None:
            self.turn_start = len(self.context) - (reply.turn or 0)
        if reply.turn is not None:
            self._begin_turn()
        if reply.again:
            self._end("abort")
        elif reply.done:
            self._end("stop" if self.room > 0 else "length")
        elif self.room == 0:
            self._end("length")
        else:
            self.phase = "answered" if self.observed else "waiting"
            if reply.turn is None:
                self._watch_turn()
        return reply

    def forked(self, epoch: int) -> None:
        """The store has begun the branch."""
        self.fork, self.epoch = None, epoch

    def resume(self, *, grant: int) -> None:
        """Go on after a send that is durable: generate within the new grant, or hand an ended turn to its environment.

        Args:
            grant: Tokens that may be generated beyond those that were sent.
        """
        if self.stop is not None:
            return
        self.limit = max(grant - len(self.tokens), 0)
        if self.phase == "ended" and not self.tokens:
            self._call(self.context[self.turn_start :])
        elif self.phase == "answered" and not self.observed:
            self.phase = "waiting"
            if self.stop_text is not None:
                self.stop_text.restart(ignored=self.min_tokens)
        if self.phase in ("waiting", "generating") and self.limit == 0 and not self.tokens:
            self._end("budget")

    def end_repetition(self) -> bool:
        """Whether the unsent tokens make it repetitive; it then ends at the token with which it became so."""
        if self.repetition is None or self.stop is not None or not self.tokens:
            return False
        end = self.repetition.find(self.tokens)
        if end is None:
            return False
        del self.context[len(self.context) - len(self.tokens) + end + 1 :]
        del self.tokens[end + 1 :], self.logprobs[end + 1 :]
        for column in self.columns.values():
            del column[end + 1 :]
        self._end("repetition")
        return True

    def abort(self) -> None:
        """Give the lease back with the next segment; what is over stays as it ended."""
        if self.stop is None:
            self._end("abort")

    def segment(self, *, version: int, next_version: int) -> Segment:
        """Everything unsent, of which nothing is unsent afterwards: either generated or observed; never both."""
        assert not (self.tokens and self.observed)
        tokens, observed = self.observed or self.tokens, bool(self.observed)
        segment = Segment(
            trajectory=self.id,
            epoch=self.epoch,
            offset=self.offset,
            version=version,
            temperature=self.control.temperature,
            tokens=np.asarray(tokens, dtype=np.int32),
            logprobs=np.asarray([] if observed else self.logprobs, dtype=np.float32),
            next_version=next_version,
            stop=self.stop,
            observed=observed,
            columns=None if observed or not tokens else {name: np.stack(own) for name, own in self.columns.items()},
        )
        self.offset += len(tokens)
        self.tokens, self.logprobs, self.observed, self.columns = [], [], [], {}
        if self.phase == "over":
            self.phase = "closed"
        return segment

    def _begin_turn(self) -> None:
        """Watch a turn of an agent, whose others and whose other samples say nothing of it."""
        if self.repetition is not None:
            self.repetition = self.repetition.anew(self.context[self.turn_start :])
        self._watch_turn()

    def _watch_turn(self) -> None:
        if self.watch is not None and self.session is not None:
            stop = (*self.control.stop, *self.session.stop)
            self.stop_text = self.watch(stop, self.context[self.turn_start :]) if stop else None

    def _call(self, action: Sequence[int] | None) -> None:
        assert self.session is not None
        self.phase = "calling"
        self.session.start(None if action is None else tuple(action))

    def _end(self, stop: StopReason) -> None:
        self.phase, self.stop = "over", stop
