"""The learner as a Ray actor: one a rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from pmdflow.config.schema import Config
from pmdflow.learner.fsdp import free_address
from pmdflow.learner.learner import Learner, TrainResult
from pmdflow.metrics.spans import Wait
from pmdflow.types import TrainBatch
from pmdflow.weights.make import make_transport
from pmdflow.weights.transport import WeightsHandle


class LearnerActor(Learner):
    """A `Learner` as a Ray actor, which publishes its weights; `launch` makes it remote."""

    def __init__(self, *, config: Config, rank: int, run_dir: str) -> None:
        """Also open the transport of the run."""
        super().__init__(config=config, rank=rank)
        self._transport = make_transport(config, Path(run_dir))
        self._idle_since = time.time()

    def address(self) -> str:
        """A free `host:port` of this node."""
        return free_address(ray.util.get_node_ip_address())

    def train(self, batch: TrainBatch) -> TrainResult:
        """Train on a claim; the time since the last call was spent waiting for it."""
        with self._busy("wait_claim"):
            return super().train(batch)

    def publish(self, version: int) -> WeightsHandle | None:
        """Gather the weights and make them fetchable as `version`; the handle at rank 0, None elsewhere."""
        with self._busy("wait_controller"):
            weights = self.weights()
            return None if weights is None else self._transport.publish(version, weights)

    def save(self, directory: str) -> None:
        """Begin to write a checkpoint's files."""
        with self._busy("wait_controller"):
            super().save(directory)

    @contextmanager
    def _busy(self, wait: Wait) -> Iterator[None]:
        """Give the time since the last call the name `wait`: every second of a rank has one."""
        self._spans.add(wait, self._idle_since, time.time())
        try:
            yield
        finally:
            self._idle_since = time.time()
