"""Attempts at prompts on one engine, without a store: what evaluation in one process needs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pmdflow.environments.protocol import Reply
from pmdflow.errors import WaitTimeout
from pmdflow.rollout.engine import RolloutEngine
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.types import Grant, Lease, Prompt

STALL_TIMEOUT_S = 600.0
"""Generation without a token or an answer of an environment for this long is given up."""


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt at a prompt."""

    prompt: int
    """Its index."""
    held: HeldTrajectory
    problems: list[str] = field(default_factory=list)
    """What its environment failed at."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Sums, by name, of what its environment said of it."""

    def take(self, reply: Reply) -> None:
        """Keep what is said of it."""
        self.problems += [reply.problem] if reply.problem else []
        for name, value in ({} if reply.note is None else reply.note.rewards).items():
            self.rewards[name] = self.rewards.get(name, 0.0) + value


def generate_attempts(
    engine: RolloutEngine, taker: LeaseTaker, prompts: Sequence[Prompt], *, samples: int, max_tokens: int
) -> Iterator[Attempt]:
    """Make `samples` attempts at every prompt, with the sampling of evaluation; environments are closed at the end.

    Raises:
        WaitTimeout: nothing happened for too long.
    """
    waiting = deque(range(len(prompts) * samples))
    holder = Holder(engine, taker)
    open_: dict[int, Attempt] = {}
    last = time.monotonic()
    try:
        while waiting or len(holder):
            while waiting and len(holder) < engine.num_slots:
                id = waiting.popleft()
                holder.join(_lease(id, prompts[id // samples], max_tokens), grant=max_tokens)
                open_[id] = Attempt(prompt=id // samples, held=holder[id])
            holder.fill_slots()
            if not engine.active() and holder.num_calling:
                holder.wait_answer()
            tokens, replies = holder.step(), holder.take_answers()
            for id, reply in replies.items():
                open_[id].take(reply)
            # Nobody stores the segments, so everything is granted at once.
            segments = holder.segments(next_version=engine.version)
            for held in holder.resume(_grant(segment.trajectory, max_tokens) for segment in segments):
                if held.session is not None:
                    held.session.close("its attempt is over")
                yield open_.pop(held.id)
            last = time.monotonic() if tokens or replies else last
            if time.monotonic() - last > STALL_TIMEOUT_S:
                raise WaitTimeout(f"{len(holder)} attempts: no token was generated for {STALL_TIMEOUT_S:g} s")
    finally:
        holder.close_environments()


def _grant(id: int, tokens: int) -> Grant:
    return Grant(trajectory=id, stale=False, tokens=tokens)


def _lease(id: int, prompt: Prompt, max_tokens: int) -> Lease:
    return Lease(
        trajectory=id,
        group=0,
        epoch=0,
        kind="eval",
        metadata=prompt.metadata,
        text=prompt.text,
        prompt=prompt.tokens,
        prefix=np.zeros(0, np.int32),
        prefix_observed=np.zeros(0, np.uint8),
        max_tokens=max_tokens,
        grant=max_tokens,
    )
