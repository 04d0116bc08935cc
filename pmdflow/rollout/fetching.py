"""Weights from wherever they are to what an engine has staged, beside its work."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pmdflow.config.schema import Config
from pmdflow.errors import WaitTimeout, WeightsLost
from pmdflow.learner.checkpoint.stored import StoredVersions
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.rollout.engine import RolloutEngine
from pmdflow.rollout.incoming import IncomingWeights
from pmdflow.types import UInt8
from pmdflow.weights.make import make_transport
from pmdflow.weights.transport import WeightsHandle

FETCH_TIMEOUT_S = 120.0
"""First weights are here within this time, if anybody has them."""
LOST_WEIGHTS_TIMEOUT_S = 1800.0
"""A learner that was killed has loaded its checkpoint and published it within this time."""


class Fetcher:
    """Fetches versions, has them staged and offers them to the generating thread."""

    def __init__(
        self, config: Config, run_dir: Path, engine: RolloutEngine, incoming: IncomingWeights, spans: SpanBuffer
    ) -> None:
        """Fetch nothing yet."""
        self._engine, self._incoming, self._spans = engine, incoming, spans
        self._any_order = config.scheduler.versions is not None
        self._stored = StoredVersions(config, run_dir)
        self._transport = make_transport(config, run_dir, stored=self._stored)
        self._seconds = 0.0

    def begin(self, handle: WeightsHandle, *, meanwhile: Callable[[], object]) -> None:
        """Fetch the first weights; if they are lost or slow, a checkpoint's until the learner offers others.

        Raises:
            WaitTimeout: nobody has any in time; until then `meanwhile` is called again and again.
        """
        try:
            self.offer(handle, timeout_s=FETCH_TIMEOUT_S)
        except (WeightsLost, WaitTimeout):
            older = None if self._any_order else self._stored.newest(before=handle.version)
            if older is not None:
                with suppress(WeightsLost, WaitTimeout):
                    self.offer(WeightsHandle(version=older, location=None), timeout_s=FETCH_TIMEOUT_S)
                    return
            with self._spans.span("wait_weights"):
                self._incoming.await_offer(timeout_s=LOST_WEIGHTS_TIMEOUT_S, meanwhile=meanwhile)

    def offer(self, handle: WeightsHandle, *, timeout_s: float) -> None:
        """Fetch a version and let the generating thread take it.

        Raises:
            WeightsLost: nobody has it any more.
            WaitTimeout: it is not here in time.
        """
        began = time.monotonic()
        weights = self._transport.fetch(handle, timeout_s=timeout_s)
        self._seconds += time.monotonic() - began
        self._incoming.offer(handle.version, (self._engine.stage(weights), handle.probe))

    def read(self, version: int, offset: int, num_bytes: int, *, delta: bool) -> UInt8:
        """Bytes of a version's file, or of its delta, for a node that does not have it."""
        return self._transport.read(version, offset, num_bytes, delta=delta)

    def counts(self) -> dict[str, int]:
        """What came in since the start, and how long that took."""
        return {**self._transport.received, "fetch_ms": round(1000 * self._seconds)}
