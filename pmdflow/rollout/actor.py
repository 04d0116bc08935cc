"""The rollout actor: leases in, segments out, weights swapped between decode steps."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.errors import EngineDied, WaitTimeout
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.rollout.engine import Output, Request, RolloutEngine
from pmdflow.rollout.repetition import repeats
from pmdflow.scheduler import sampling_temperature
from pmdflow.store import encode_segments
from pmdflow.types import Grant, Lease, Segment, StopReason
from pmdflow.weights.transport import Weights, WeightsHandle, make_transport

LEASE_WAIT_S = 0.25
"""How long a request for leases stays parked in the store; bounds how old the version it was asked for can be."""
STORE_TIMEOUT_S = 120.0
"""An append unanswered for this long ends the actor: it outlasts a restart of the store actor."""
SPAN_S = 1.0
"""Longest `generate` span, so that a live timeline grows."""


@dataclass(slots=True)
class _Sequence:
    """What the actor knows of a trajectory that it holds a lease for."""

    lease: Lease
    offset: int
    """Generated tokens already sent to the store."""
    temperature: float
    limit: int
    """Tokens that the engine may still generate."""
    history: list[int]
    """Everything generated so far, under this lease and before."""
    tokens: list[int] = field(default_factory=list)
    """Generated and not yet sent."""
    logprobs: list[float] = field(default_factory=list)
    stop: StopReason | None = None


class RolloutActor:
    """Holds one engine and no trajectory state: it can vanish at any instant, and only unsent tokens are lost."""

    def __init__(self, *, config: Config, index: int, store: Any, run_dir: str) -> None:
        """Load the engine; `store` is the handle of the store actor."""
        self._config = config
        self._name = f"rollout-{index}"
        self._store = store
        self._transport = make_transport(config, Path(run_dir))
        self._engine = make_engine(config, seed=config.run.seed * 1000 + index)
        self._spans = SpanBuffer(self._name)
        self._running: dict[int, _Sequence] = {}
        self._lease_ref: Any = None
        self._lease_version = -1
        self._append_ref: Any = None
        self._last_flush = 0.0
        self._generated = 0
        self._span_start: float | None = None
        self._weights = threading.Condition()
        self._pending: tuple[int, Any] | None = None
        """A version and its weights as the engine has staged them."""
        self._newest_offer = 0
        self._stopping = threading.Event()

    def run(self, handle: WeightsHandle | None) -> None:
        """Generate until `stop`, from the weights of `handle`; None means those of the model folder.

        Consumes: leases and weights. Produces: segments. Waits for: a lease or a grant, at most `LEASE_WAIT_S` at a
        time. Unblocked by: admission, a publication, an expired lease of another worker.

        Raises:
            EngineDied: the engine's process is gone or silent; everything generated is sent and every lease given back.
        """
        if handle is not None:
            self._offer(handle.version, self._transport.fetch(handle, timeout_s=STORE_TIMEOUT_S))
        try:
            while not self._stopping.is_set():
                self._swap_weights()
                self._collect()
                self._request_leases()
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

    def drain(self) -> dict[str, Any]:
        """Spans since the last call, and the tokens generated since the start."""
        return {
            "spans": self._spans.drain(),
            "generated_tokens": self._generated,
            "drafted_tokens": self._engine.drafted_tokens,
            "accepted_tokens": self._engine.accepted_tokens,
        }

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
        sequence = self._running[output.id]
        sequence.tokens.extend(output.tokens)
        sequence.history.extend(output.tokens)
        sequence.logprobs.extend(output.logprobs)
        sequence.limit -= len(output.tokens)
        sequence.stop = output.stop
        self._generated += len(output.tokens)

    def _end_span(self) -> None:
        if self._span_start is not None:
            self._spans.add("generate", self._span_start, time.time(), version=self._engine.version)
            self._span_start = None

    def _idle(self) -> None:
        """Nothing to decode: wait for a lease or for the grants of the append in flight."""
        self._end_span()
        if self._append_ref is None and self._running:
            self._flush()
        refs = [ref for ref in (self._lease_ref, self._append_ref) if ref is not None]
        name = "wait_grant" if self._running else "wait_lease"
        with self._spans.span(name):
            if refs:
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
        free = self._engine.num_slots - len(self._running)
        awaiting = self._pending is not None and self._config.rollout.on_new_weights == "finish"
        if self._lease_ref is None and free > 0 and not awaiting:
            self._lease_version = self._engine.version
            self._lease_ref = self._store.lease.remote(self._name, self._lease_version, free, LEASE_WAIT_S)

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
        temperature = self._temperature() if lease.kind == "train" else self._config.eval.temperature
        self._running[lease.trajectory] = _Sequence(
            lease=lease, offset=len(lease.prefix), temperature=temperature, limit=grant, history=lease.prefix.tolist()
        )
        self._engine.add(
            Request(
                id=lease.trajectory,
                tokens=np.concatenate([lease.prompt, lease.prefix]),
                limit=grant,
                remaining=lease.max_tokens - len(lease.prefix),
                temperature=temperature,
            )
        )

    def _temperature(self) -> float:
        """That of the engine's version; a lease keeps the one it began with, and every segment records its own."""
        rollout = self._config.rollout
        return sampling_temperature(
            self._engine.version,
            initial=rollout.temperature,
            final=rollout.final_temperature,
            iterations=rollout.temperature_iterations,
        )

    def _flush_when_due(self) -> None:
        if self._append_ref is None and time.monotonic() - self._last_flush >= self._config.rollout.flush_interval_s:
            self._flush()

    def _flush(self) -> None:
        self._send(next_version=self._engine.version)

    def _send(self, *, next_version: int) -> None:
        """Append everything unsent, and renew every lease, in one call."""
        self._last_flush = time.monotonic()
        if not self._running:
            return
        segments = []
        for sequence in self._running.values():
            self._stop_repetition(sequence)
            segments.append(self._segment(sequence, next_version=next_version))
            sequence.offset += len(sequence.tokens)
            sequence.tokens, sequence.logprobs = [], []
        self._append_ref = self._store.append.remote(encode_segments(segments))

    def _stop_repetition(self, sequence: _Sequence) -> None:
        """End a trajectory that only repeats itself; looked at when tokens are sent, so it overruns by a few."""
        times = self._config.rollout.repetition_limit
        trained = sequence.lease.kind == "train"
        if times is None or not trained or sequence.stop is not None or not sequence.tokens:
            return
        if repeats(sequence.history, times=times):
            sequence.stop = "repetition"
            self._engine.abort(sequence.lease.trajectory)

    def _segment(self, sequence: _Sequence, *, next_version: int) -> Segment:
        return Segment(
            trajectory=sequence.lease.trajectory,
            epoch=sequence.lease.epoch,
            offset=sequence.offset,
            version=self._engine.version,
            temperature=sequence.temperature,
            tokens=np.asarray(sequence.tokens, dtype=np.int32),
            logprobs=np.asarray(sequence.logprobs, dtype=np.float32),
            next_version=next_version,
            stop=sequence.stop,
        )

    def _await_append(self) -> None:
        """Take the answers of the append in flight: grants extend, a stale lease drops its sequence."""
        if self._append_ref is None:
            return
        grants: list[Grant] = ray.get(self._append_ref, timeout=STORE_TIMEOUT_S)
        self._append_ref = None
        for grant in grants:
            self._apply_grant(grant)

    def _apply_grant(self, grant: Grant) -> None:
        sequence = self._running[grant.trajectory]
        if grant.stale or (sequence.stop is not None and not sequence.tokens):
            self._engine.abort(grant.trajectory)
            del self._running[grant.trajectory]
        elif sequence.stop is None:
            sequence.limit = max(grant.tokens - len(sequence.tokens), 0)
            self._engine.extend(grant.trajectory, sequence.limit)
            if sequence.limit == 0 and not sequence.tokens:
                sequence.stop = "budget"

    def _release_all(self) -> None:
        """Send what is unsent and make every held trajectory leasable again."""
        self._await_append()
        self._collect()
        for sequence in self._running.values():
            if sequence.stop is None:
                sequence.stop = "abort"
        self._flush()
        self._await_append()


def make_engine(config: Config, *, seed: int) -> RolloutEngine:
    """The engine that `rollout.engine` names."""
    rollout = config.rollout
    if rollout.engine == "simulated":
        from pmdflow.rollout.simulated_engine import SimulatedEngine

        return SimulatedEngine(num_slots=rollout.slots or DEFAULT_SLOTS, seed=seed)
    if rollout.engine == "vllm":
        from pmdflow.rollout.vllm_engine import VllmEngine
        from pmdflow.rollout.vllm_settings import VllmSettings

        return VllmEngine(VllmSettings.of(config), seed=seed)
    from pmdflow.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        model_path=config.model.path,
        dtype=config.model.dtype,
        num_slots=rollout.slots or DEFAULT_SLOTS,
        threads=config.rollout.threads,
        seed=seed,
    )
