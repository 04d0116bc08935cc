"""The rollout actor: leases in, segments out, weights swapped between decode steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import ray

from pmdflow.config.schema import Config
from pmdflow.errors import EngineDied, WaitTimeout
from pmdflow.metrics.report import ActorReport, Event
from pmdflow.metrics.spans import SpanBuffer, Wait
from pmdflow.rollout.engine import Output
from pmdflow.rollout.engines.make import make_engine
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.store.segments import encode_segments
from pmdflow.types import Grant, Lease
from pmdflow.weights.make import make_transport
from pmdflow.weights.transport import Weights, WeightsHandle

LEASE_WAIT_S = 0.25
"""How long a request for leases stays parked in the store; bounds how old the version it was asked for can be."""
STORE_TIMEOUT_S = 120.0
"""An append unanswered for this long ends the actor: it outlasts a restart of the store actor."""
SLOTS_PER_SPARE = 8
"""For so many slots one lease more is held: a slot that falls free is not empty while the store is asked."""
CALL_WAIT_S = 0.02
"""How long an idle actor waits for environments before it looks at the store again."""
MAX_PROBLEMS = 20
"""Problems of environments kept between two drains."""
SPAN_S = 1.0
"""Longest `generate` span, so that a live timeline grows."""


class RolloutActor:
    """Holds one engine and no trajectory state: it can vanish at any instant, and only unsent tokens are lost."""

    def __init__(self, *, config: Config, index: int, store: Any, run_dir: str) -> None:
        """Load the engine; `store` is the handle of the store actor."""
        self._config = config
        self._name = self._worker = f"rollout-{index}"
        self._store = store
        self._transport = make_transport(config, Path(run_dir))
        self._engine = make_engine(config, seed=config.run.seed * 1000 + index)
        self._spans = SpanBuffer(self._name)
        self._running: dict[int, HeldTrajectory] = {}
        self._lease_ref: Any = None
        self._lease_version = -1
        self._append_ref: Any = None
        self._last_flush = 0.0
        self._leases = LeaseTaker(config)
        self._problems: deque[str] = deque(maxlen=MAX_PROBLEMS)
        """What environments failed at since the last drain."""
        self._generated = 0
        self._span_start: float | None = None
        self._weights = threading.Condition()
        self._pending: tuple[int, Any] | None = None
        """A version and its weights as the engine has staged them."""
        self._newest_offer = 0
        self._stopping = threading.Event()

    def run(self, handle: WeightsHandle | None, worker: str) -> None:
        """Generate until `stop`, from the weights of `handle`; None means those of the model folder.

        Leases are taken as `worker`, a name that no actor before it had: the leases of those may be fenced at any time.

        Consumes: leases and weights. Produces: segments. Waits for: a lease or a grant, at most `LEASE_WAIT_S` at a
        time. Unblocked by: admission, a publication, an expired lease of another worker.

        Raises:
            EngineDied: the engine's process is gone or silent; everything generated is sent and every lease given back.
        """
        self._worker = worker
        if handle is not None:
            self._offer(handle.version, self._transport.fetch(handle, timeout_s=STORE_TIMEOUT_S))
        try:
            while not self._stopping.is_set():
                self._swap_weights()
                self._collect()
                self._take_answers()
                self._request_leases()
                self._fill_slots()
                if self._engine.active():
                    self._step()
                else:
                    self._idle()
                self._flush_when_due()
        except EngineDied:
            self._release_all()
            raise
        self._release_all()

    def update_weights(self, handle: WeightsHandle, timeout_s: float) -> bool:
        """Fetch a version beside generation, and wait until it is in use.

        Returns:
            False if the actor stopped, or a newer version came, before this one was used.

        Raises:
            WaitTimeout: it was not in use within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        weights = self._transport.fetch(handle, timeout_s=timeout_s)
        self._offer(handle.version, weights)
        with self._weights:
            while self._engine.version < handle.version == self._newest_offer and not self._stopping.is_set():
                if not self._weights.wait(timeout=deadline - time.monotonic()):
                    raise WaitTimeout(f"{self._name} did not apply version {handle.version} within {timeout_s:g} s")
            return self._engine.version == handle.version

    def stop(self) -> None:
        """Let `run` send what it has, give its leases back and return."""
        self._stopping.set()
        with self._weights:
            self._weights.notify_all()

    def drain(self) -> ActorReport:
        """Spans and problems of environments since the last call, and counts of tokens since the start."""
        problems = [self._problems.popleft() for _ in range(len(self._problems))]
        attrs = {"actor": self._name}
        return ActorReport(
            spans=self._spans.drain(),
            events=[Event(kind="environment_failed", message=problem, attrs=attrs) for problem in problems],
            tokens={
                "generated_tokens": self._generated,
                "drafted_tokens": self._engine.drafted_tokens,
                "accepted_tokens": self._engine.accepted_tokens,
            },
        )

    def _offer(self, version: int, weights: Weights) -> None:
        staged = self._engine.stage(weights)
        with self._weights:
            if self._newest_offer < version:
                self._pending, self._newest_offer = (version, staged), version
                self._weights.notify_all()

    def _step(self) -> None:
        if self._span_start is None:
            self._span_start = time.time()
        for output in self._engine.step():
            self._take(output)
        if time.time() - self._span_start > SPAN_S:
            self._end_span()

    def _take(self, output: Output) -> None:
        held = self._running[output.id]
        self._generated += held.take(output)
        if output.stop is None and (held.stop is not None or held.phase != "generating"):
            self._engine.abort(output.id)

    def _take_answers(self) -> None:
        """Take what environments have answered; their trajectories go on once that is durable."""
        for held in self._running.values():
            reply = held.session.poll() if held.session is not None and held.phase == "calling" else None
            if reply is None:
                continue
            if reply.problem:
                self._problems.append(reply.problem)
            held.answer(reply)

    def _end_span(self) -> None:
        if self._span_start is not None:
            self._spans.add("generate", self._span_start, time.time(), version=self._engine.version)
            self._span_start = None

    def _idle(self) -> None:
        """Nothing to decode: wait for an environment, for a lease or for the grants of the append in flight."""
        self._end_span()
        calls = [held.session.call for held in self._running.values() if held.session and held.phase == "calling"]
        if self._append_ref is None and len(self._running) > len(calls):
            self._flush()
        refs = [ref for ref in (self._lease_ref, self._append_ref) if ref is not None]
        name: Wait = "wait_environment" if calls else "wait_grant" if self._running else "wait_lease"
        with self._spans.span(name):
            if calls:
                wait([call for call in calls if call is not None], timeout=CALL_WAIT_S, return_when=FIRST_COMPLETED)
            elif refs:
                ray.wait(refs, num_returns=1, timeout=LEASE_WAIT_S)
            else:  # new weights are awaited by `finish` with an empty engine
                self._stopping.wait(timeout=0.01)

    def _swap_weights(self) -> None:
        """Take pending weights; every token sent before carries the old version, every one after the new.

        The weights are loaded while the store answers with the grants for them.
        """
        if self._pending is None:
            return
        if self._config.rollout.on_new_weights == "finish" and self._running:
            return
        with self._weights:
            version, staged = self._pending
            self._pending = None
        self._await_append()
        self._end_span()
        with self._spans.span("apply_weights", version=version) as attrs:
            attrs["running"] = len(self._running)
            start = time.monotonic()
            for output in self._engine.pause():
                self._take(output)
            self._send(next_version=version)
            attrs["pause_s"] = time.monotonic() - start
            self._engine.load_weights(version, staged, on_new_weights=self._config.rollout.on_new_weights)
            attrs["load_s"] = time.monotonic() - start - attrs["pause_s"]
            self._await_append()
            self._engine.resume()
        with self._weights:
            self._weights.notify_all()

    def _request_leases(self) -> None:
        slots, finish = self._engine.num_slots, self._config.rollout.on_new_weights == "finish"
        wanted = slots if finish else slots + slots // SLOTS_PER_SPARE
        # One that has ended waits only for its last append.
        wanted -= sum(held.stop is None for held in self._running.values())
        awaiting = self._pending is not None and finish
        if self._lease_ref is None and wanted > 0 and not awaiting:
            self._lease_version = self._engine.version
            self._lease_ref = self._store.lease.remote(self._worker, self._lease_version, wanted, LEASE_WAIT_S)

    def _fill_slots(self) -> None:
        """Give the engine what waits for it, oldest lease first."""
        open_ones = [held for held in self._running.values() if held.stop is None]
        free = self._engine.num_slots - sum(held.phase == "generating" for held in open_ones)
        for held in [held for held in open_ones if held.phase == "waiting" and held.limit > 0][:free]:
            self._engine.add(held.begin())

    def _collect(self) -> None:
        refs = [ref for ref in (self._lease_ref, self._append_ref) if ref is not None]
        ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
        if self._append_ref in ready:
            self._await_append()
        if self._lease_ref in ready:
            leases: list[Lease] = ray.get(self._lease_ref, timeout=STORE_TIMEOUT_S)
            self._lease_ref = None
            if any(lease.trajectory in self._running for lease in leases):
                self._await_append()  # it gave the leases back, and is answered later: once that is durable
            for lease in leases:
                if self._running.pop(lease.trajectory, None) is not None:  # the lease had expired
                    self._engine.abort(lease.trajectory)
                self._join(lease)

    def _join(self, lease: Lease) -> None:
        # A grant is for the version it was asked for; after a swap the next append asks for a new one.
        grant = lease.grant if self._lease_version == self._engine.version else 0
        held = self._leases.take(lease, limit=grant, version=self._engine.version)
        self._running[lease.trajectory] = held

    def _flush_when_due(self) -> None:
        # Half an interval until tokens are sent leaves the other half to make them durable. A store that is slower is
        # waited for: what is generated meanwhile would be lost too.
        due = time.monotonic() - self._last_flush >= self._config.rollout.flush_interval_s / 2
        if due:
            self._await_append()
        if due or (self._append_ref is None and any(held.urgent for held in self._running.values())):
            self._flush()

    def _flush(self) -> None:
        self._send(next_version=self._engine.version)

    def _send(self, *, next_version: int) -> None:
        """Append everything unsent, and renew every lease, in one call."""
        self._last_flush = time.monotonic()
        if not self._running:
            return
        for held in self._running.values():
            if held.end_repetition():
                self._engine.abort(held.lease.trajectory)
        version = self._engine.version
        segments = [held.segment(version=version, next_version=next_version) for held in self._running.values()]
        self._append_ref = self._store.append.remote(encode_segments(segments))

    def _await_append(self) -> None:
        """Take the answers of the append in flight: grants extend, a stale lease drops its sequence."""
        if self._append_ref is None:
            return
        grants: list[Grant] = ray.get(self._append_ref, timeout=STORE_TIMEOUT_S)
        self._append_ref = None
        for grant in grants:
            self._apply_grant(grant)

    def _apply_grant(self, grant: Grant) -> None:
        held = self._running[grant.trajectory]
        if grant.stale or held.closed:
            self._engine.abort(grant.trajectory)
            del self._running[grant.trajectory]
        elif held.stop is None:
            held.limit = max(grant.tokens - len(held.tokens), 0)
            self._go_on(held)

    def _go_on(self, held: HeldTrajectory) -> None:
        """What was sent is durable: generate on, or hand a turn that has ended to its environment."""
        if held.phase == "ended" and not held.tokens:
            assert held.session is not None
            held.phase = "calling"
            held.session.start(tuple(held.context[held.turn_start :]))
        elif held.phase == "answered" and not held.observed:
            held.phase = "waiting"
            self._leases.watch(held)
        elif held.phase == "generating":
            self._engine.extend(held.lease.trajectory, held.limit)
        if held.phase in ("waiting", "generating") and held.limit == 0 and not held.tokens:
            held.stop = "budget"
            self._engine.abort(held.lease.trajectory)

    def _release_all(self) -> None:
        """Send what is unsent and make every held trajectory leasable again."""
        self._await_append()
        self._collect()
        for held in self._running.values():
            if held.stop is None:
                held.stop = "abort"
        self._flush()
        self._await_append()
