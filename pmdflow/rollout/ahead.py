"""Turns that wait for their place in an episode, generated ahead of it in slots that nobody else needs.

A lease extends one history at a time, so several conversations of one episode, or several samples of one request, are
stored one after another. Their tokens need not wait for that: what is generated here is appended when its turn has
come, under the grants of then. Until then it is as what is unsent: lost with its actor, and thrown away where other
weights come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count, zip_longest

import numpy as np

from pmdflow.agents.asked import Next
from pmdflow.agents.session import AgentSession
from pmdflow.data.stop_text import StopText
from pmdflow.rollout.engine import Output, Request, RolloutEngine
from pmdflow.rollout.held import HeldTrajectory

_FIRST_ID = 1 << 40
"""Of sequences here, in the engine; beyond those of trajectories."""


@dataclass(slots=True)
class _Early:
    id: int
    trajectory: int
    wanted: Next
    watch: StopText | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    """With a whole turn, but for a request's own limit."""
    running: bool = True


class Ahead:
    """Those of one engine; all calls come from its thread."""

    def __init__(self, engine: RolloutEngine) -> None:
        """Generate nothing yet."""
        self._engine = engine
        self._ids = count(_FIRST_ID)
        self._early: dict[int, _Early] = {}

    @property
    def num_running(self) -> int:
        """Slots that are taken here."""
        return sum(early.running for early in self._early.values())

    def fill(self, held: Iterable[HeldTrajectory], free: int) -> None:
        """Begin what is asked for, in up to `free` slots; what nobody asks for any more is forgotten."""
        wanted = []
        for one in held:
            session = one.session
            if not isinstance(session, AgentSession) or one.stop is not None:
                continue
            keys = session.ahead()
            known = {early.wanted.key: early for early in self._of(one.id)}
            for key, early in known.items():
                if key not in keys and key != session.turn_key:
                    self._forget(early)
            wanted.append([(one, session, key) for key in keys if key not in known])
        for turns in zip_longest(*wanted):  # each episode in its turn
            for turn in turns:
                if turn is not None and free > 0 and (planned := turn[1].plan(turn[2])) is not None:
                    self._begin(turn[0], planned)
                    free -= 1

    def stop(self, slots: int) -> None:
        """Free slots for those whose turn it is, the newest first; what is generated stays."""
        for early in [early for early in reversed(self._early.values()) if early.running][: max(slots, 0)]:
            self._pause(early)

    def take(self, output: Output) -> bool:
        """Take what the engine gave out, if it is of a sequence here."""
        early = self._early.get(output.id)
        if early is None:
            return output.id >= _FIRST_ID
        end = early.watch.find(output.tokens) if early.watch is not None else None
        kept = len(output.tokens) if end is None else end + 1
        early.tokens.extend(output.tokens[:kept])
        early.logprobs.extend(output.logprobs[:kept])
        early.ended = end is not None or output.stop == "stop"
        if early.ended or len(early.tokens) >= early.wanted.limit:
            self._pause(early)
        return True

    def feed(self, held: HeldTrajectory, *, version: int) -> int:
        """Give a trajectory whose turn has come what was generated of it, within its grant; returns how many tokens."""
        session = held.session
        if not isinstance(session, AgentSession):
            return 0
        early = next((early for early in self._of(held.id) if early.wanted.key == session.turn_key), None)
        if early is None:
            return 0
        self._pause(early)
        if early.wanted.history != (*held.lease.prompt.tolist(), *held.context[: held.turn_start]):
            self._forget(early)
            return 0
        count = min(held.limit, held.room, len(early.tokens))
        whole = count == len(early.tokens)
        output = Output(
            id=held.id,
            tokens=early.tokens[:count],
            logprobs=early.logprobs[:count],
            stop="stop" if whole and early.ended else "length" if count == held.room else None,
        )
        del early.tokens[:count], early.logprobs[:count]
        if whole:
            del self._early[early.id]
        return held.take(output, version=version) if count else 0

    def forget(self, trajectory: int | None = None) -> None:
        """Throw away what was generated of a trajectory, or of all."""
        for early in list(self._early.values()) if trajectory is None else self._of(trajectory):
            self._forget(early)

    def _of(self, trajectory: int) -> list[_Early]:
        return [early for early in self._early.values() if early.trajectory == trajectory]

    def _begin(self, held: HeldTrajectory, turn: Next) -> None:
        stop = (*held.control.stop, *turn.stop)
        watch = held.watch(stop, ()) if stop and held.watch is not None else None
        early = _Early(next(self._ids), held.id, turn, watch)
        self._early[early.id] = early
        said = len(turn.history) - len(held.lease.prompt)
        self._engine.add(
            Request(
                id=early.id,
                tokens=np.asarray(turn.history, np.int32),
                limit=turn.limit,
                remaining=turn.limit,
                temperature=held.control.temperature,
                top_p=held.control.top_p,
                min_tokens=max(held.control.min_tokens - said, 0),
                stop_token_ids=held.control.stop_token_ids,
            )
        )

    def _pause(self, early: _Early) -> None:
        if early.running:
            self._engine.abort(early.id)
            early.running = False

    def _forget(self, early: _Early) -> None:
        self._pause(early)
        self._engine.overrun_tokens += len(early.tokens)
        del self._early[early.id]
