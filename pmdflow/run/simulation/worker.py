"""A simulated rollout actor: what it holds, and how far it is."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pmdflow.run.simulation.models import EngineModel
from pmdflow.types import Grant, Lease, Segment, StopReason


@dataclass(slots=True, kw_only=True)
class Running:
    """One sequence that is being generated."""

    epoch: int
    offset: int
    """Tokens in the store."""
    since: int
    """Step of the worker at which the store had them all."""
    granted: int
    """Tokens that it may have beyond `offset`."""
    length: int
    """Tokens that it will have."""

    @property
    def due(self) -> int:
        """Step at which it ends or needs another grant."""
        return self.since + min(self.length - self.offset, self.granted)


@dataclass(slots=True, kw_only=True)
class Worker:
    """Generates whole steps; between two events the set of running sequences is the same."""

    name: str
    engine: EngineModel
    version: int = 0
    lost: bool = False
    """It has died, and nothing has taken its place."""
    step: int = 0
    context: int = 0
    """Tokens in the contexts of the running sequences."""
    running: dict[int, Running] = field(default_factory=dict)
    due: list[tuple[int, int]] = field(default_factory=list)
    """Heap of (step, trajectory); entries of sequences that ended or were granted more are stale."""
    started: float = 0.0
    """When the steps under way began."""
    chunk: int = 0
    """Steps under way."""
    chunk_s: float = 0.0
    serial: int = 0
    """Number of the event that ends them; an earlier one is void."""
    waits_since: float | None = None
    """Since when it has had nothing to generate."""
    cause: str = ""
    """Why."""
    busy_s: float = 0.0

    def join(self, lease: Lease, *, length: int) -> float:
        """Begin or continue a trajectory; the seconds that its prompt and prefix cost."""
        prefix = len(lease.prefix)
        running = Running(epoch=lease.epoch, offset=prefix, since=self.step, granted=lease.grant, length=length)
        self.running[lease.trajectory] = running
        self.context += len(lease.prompt) + prefix
        heapq.heappush(self.due, (running.due, lease.trajectory))
        return self.engine.prefill_s * (len(lease.prompt) + prefix)

    def begin(self, now: float, *, delay_s: float, training: bool) -> float | None:
        """Begin the steps up to the next event; when they end, or None without a sequence."""
        if not self.running:
            self.chunk, self.chunk_s = 0, 0.0
            return None
        while self._is_stale(*self.due[0]):
            heapq.heappop(self.due)
        self.chunk = max(self.due[0][0] - self.step, 0)
        mean_context = self.context + len(self.running) * self.chunk / 2
        self.chunk_s = self.engine.steps_s(
            self.chunk, running=len(self.running), context=mean_context, training=training
        )
        self.started = now + delay_s
        return self.started + self.chunk_s

    def advance(self, now: float) -> None:
        """Count the steps that are done by now."""
        spent = min(max(now - self.started, 0.0), self.chunk_s)
        # Exact at the end of the chunk, whatever the rounding of times.
        done = self.chunk if spent >= self.chunk_s * (1 - 1e-9) else int(self.chunk * spent / self.chunk_s)
        self.busy_s += spent
        self.step += done
        self.context += done * len(self.running)
        self.chunk, self.chunk_s = 0, 0.0

    def take_due(self) -> list[int]:
        """Trajectories that have ended or need a grant."""
        taken: dict[int, None] = {}
        while self.due and self.due[0][0] <= self.step:
            step, trajectory = heapq.heappop(self.due)
            if not self._is_stale(step, trajectory):
                taken[trajectory] = None
        return list(taken)

    def segments(
        self, trajectories: list[int], *, next_version: int, max_tokens: int, release: bool = False
    ) -> Iterator[Segment]:
        """What these have generated beyond the store; without a grant, or for `release`, they are left to others."""
        for trajectory in trajectories:
            running = self.running[trajectory]
            number = self.step - running.since
            stop: StopReason | None = None
            if running.offset + number >= running.length:
                stop = "length" if running.length == max_tokens else "stop"
            elif number == 0 and running.granted == 0 and next_version == self.version:
                stop = "budget"
            elif release:
                stop = "abort"
            yield Segment(
                trajectory=trajectory,
                epoch=running.epoch,
                offset=running.offset,
                version=self.version,
                temperature=1.0,
                tokens=np.full(number, 7, dtype=np.int32),
                logprobs=np.full(number, -1.0, dtype=np.float32),
                next_version=next_version,
                stop=stop,
            )

    def answered(self, segment: Segment, grant: Grant, *, prompt_tokens: int) -> None:
        """Go on with what the store granted, or let go of a trajectory that ended or was lost."""
        running = self.running[segment.trajectory]
        if grant.stale or segment.stop is not None:
            self.context -= prompt_tokens + running.offset + len(segment.tokens)
            del self.running[segment.trajectory]
            return
        running.offset += len(segment.tokens)
        running.since, running.granted = self.step, grant.tokens
        heapq.heappush(self.due, (running.due, segment.trajectory))

    def forget(self) -> None:
        """Die: everything held is gone."""
        self.lost = True
        self.running.clear()
        self.due.clear()
        self.context = 0

    def _is_stale(self, step: int, trajectory: int) -> bool:
        running = self.running.get(trajectory)
        return running is None or running.due != step
