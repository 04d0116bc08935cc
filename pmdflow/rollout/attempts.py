"""Attempts at prompts on one engine, without a store: what evaluation in one process needs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait

import numpy as np

from pmdflow.errors import WaitTimeout
from pmdflow.rollout.engine import RolloutEngine
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.types import Lease, Prompt

STALL_TIMEOUT_S = 600.0
"""Generation without a token or an answer of an environment for this long is given up."""
CALL_WAIT_S = 0.02
"""How long to wait for environments at a time."""


def generate_attempts(
    engine: RolloutEngine, taker: LeaseTaker, prompts: Sequence[Prompt], *, samples: int, max_tokens: int
) -> Iterator[tuple[int, HeldTrajectory, list[str]]]:
    """Make `samples` attempts at every prompt, with the sampling of evaluation.

    Yields:
        Index of the prompt, the finished attempt, and what its environment failed at.

    Raises:
        WaitTimeout: nothing happened for too long.
    """
    waiting = deque(range(len(prompts) * samples))
    running: dict[int, HeldTrajectory] = {}
    problems: dict[int, list[str]] = {}
    last = time.monotonic()
    while waiting or running:
        while waiting and len(running) < engine.num_slots:
            id = waiting.popleft()
            lease = _lease(id, prompts[id // samples], max_tokens)
            running[id], problems[id] = taker.take(lease, limit=max_tokens, version=engine.version), []
            if running[id].phase == "waiting":
                engine.add(running[id].begin())
        moved = _decode(engine, running) | _converse(engine, taker, running, problems)
        last = time.monotonic() if moved else last
        for id in [id for id, held in running.items() if held.stop is not None]:
            yield id // samples, running.pop(id), problems.pop(id)
        if time.monotonic() - last > STALL_TIMEOUT_S:
            raise WaitTimeout(f"{len(running)} attempts: no token was generated for {STALL_TIMEOUT_S:g} s")


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


def _decode(engine: RolloutEngine, running: dict[int, HeldTrajectory]) -> bool:
    """One step of the engine; whether it gave anything."""
    outputs = engine.step()
    for output in outputs:
        held = running[output.id]
        held.take(output)
        held.end_repetition()
        held.tokens, held.logprobs = [], []  # nobody stores them
        if output.stop is None and (held.stop is not None or held.phase != "generating"):
            engine.abort(output.id)
    return bool(outputs)


def _converse(
    engine: RolloutEngine, taker: LeaseTaker, running: dict[int, HeldTrajectory], problems: dict[int, list[str]]
) -> bool:
    """Hand ended turns to their environments and go on with those that are answered; whether there was one."""
    calls, answered = [], False
    for id, held in running.items():
        if held.session is None:
            continue
        if held.phase == "ended":
            held.phase = "calling"
            held.session.start(tuple(held.context[held.turn_start :]))
        if held.phase != "calling":
            continue
        reply = held.session.poll()
        if reply is None:
            calls.append(held.session.call)
            continue
        answered = True
        problems[id] += [reply.problem] if reply.problem else []
        held.answer(reply)
        if held.stop is None:
            taker.watch(held)
            engine.add(held.begin())
    if calls and not engine.active():
        wait([call for call in calls if call is not None], timeout=CALL_WAIT_S, return_when=FIRST_COMPLETED)
    return answered
