"""The learner as a Ray actor: one a rank."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError

from pmdflow.config.schema import Config
from pmdflow.errors import WaitTimeout
from pmdflow.learner.checkpoint.manifest import CheckpointFile
from pmdflow.learner.result import TrainResult
from pmdflow.metrics.report import ActorReport
from pmdflow.metrics.spans import SpanBuffer, Wait
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import StoreHandle, call
from pmdflow.types import Claim, ClaimTokens, Int64, TrainBatch, UInt8
from pmdflow.weights.device_turn import DeviceTurn
from pmdflow.weights.make import make_transport
from pmdflow.weights.transport import WeightsHandle, in_group

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables of torch's allocator, the second by its older name."""
TURN_TIMEOUT_S = 300.0
"""An engine that was asked to sleep has given the device back within this time."""
READ_TIMEOUT_S = 600.0
"""Tokens that are not there after this long never will be; it outlasts a restart of the store actor."""


class LearnerActor:
    """A `Learner` in a process of its own, which publishes its weights; `launch` makes it remote.

    torch is loaded there, not where it is called from.
    """

    def __init__(self, *, config: Config, rank: int, run_dir: str) -> None:
        """Make the learner and open the transport of the run."""
        if not any(name in os.environ for name in ALLOCATOR):
            os.environ[ALLOCATOR[0]] = "expandable_segments:True"  # rows of any length cut up the memory of a GPU
        from pmdflow.learner.learner import Learner

        self._engine_share = config.rollout.memory_share or 0.0
        self._turn = DeviceTurn.own(run_dir, rank) if config.cluster.colocate else None
        self._learner = Learner(config=config, rank=rank)
        self._transport = make_transport(config, Path(run_dir))
        self._waits = SpanBuffer(f"learner-{rank}")
        self._idle_since = time.time()

    def address(self) -> str:
        """A free `host:port` of this node."""
        from pmdflow.learner.fsdp import free_address

        return free_address(ray.util.get_node_ip_address())

    def setup(self, master: str) -> None:
        """See `Learner.setup`; in a colocated run the rank has its device from here on until it offloads."""
        if self._turn is not None:
            self._turn.take(timeout_s=TURN_TIMEOUT_S)
        self._cap_memory()
        self._learner.setup(master)

    def offload(self) -> None:
        """See `Learner.offload`; then an engine may have the device."""
        assert self._turn is not None, "only a colocated run offloads"
        with self._busy("wait_controller"):
            self._learner.offload()
            self._turn.give()

    def restore(self) -> None:
        """See `Learner.restore`; waits until the engine has given the device back."""
        assert self._turn is not None, "only a colocated run restores"
        with self._busy("wait_claim"):
            asked = time.time()
            self._turn.take(timeout_s=TURN_TIMEOUT_S)
            self._waits.add("wait_device", asked, time.time())
            self._learner.restore()

    def device_info(self) -> dict[str, Any]:
        """See `Learner.device_info`."""
        return self._learner.device_info()

    def load_initial(self) -> None:
        """See `Learner.load_initial`."""
        self._learner.load_initial()

    def load(self, directory: str) -> None:
        """See `Learner.load`."""
        self._learner.load(directory)

    def train(self, claim: Claim, store: StoreHandle) -> TrainResult:
        """Train on a claim of `store`, from which this rank reads the tokens of its own trajectories alone.

        The time since the last call was spent waiting for it.

        Raises:
            WaitTimeout: the store did not give the tokens in time.
        """

        def read(rows: Int64) -> ClaimTokens:
            ids, names = claim.trajectories[rows], sorted(self._learner.columns)
            asked: list[ray.ObjectRef[Any]] = [call(store, StoreActor.read_tokens, ids)]
            if names:
                lengths = np.diff(claim.cu_seqlens)[rows]
                starts = (np.cumsum(lengths) - lengths + claim.prompt_lengths[rows]).astype(np.int64)
                asked.append(call(store, StoreActor.read_columns, ids, starts, int(lengths.sum()), names))
            try:
                answers = ray.get(asked, timeout=READ_TIMEOUT_S)
                tokens: ClaimTokens = answers[0]
                return replace(tokens, extra=answers[1]) if names else tokens
            except GetTimeoutError as error:
                raise WaitTimeout(
                    f"the store actor did not give iteration {claim.iteration} within {READ_TIMEOUT_S:g} s"
                ) from error

        with self._busy("wait_claim"):
            return self._learner.train_claim(claim, read)

    def train_batch(self, batch: TrainBatch) -> TrainResult:
        """Train on a claim that is given whole, as a replay does."""
        with self._busy("wait_claim"):
            return self._learner.train(batch)

    def publish(self, version: int) -> WeightsHandle:
        """Make the weights fetchable as `version`; every rank has the same handle."""
        with self._busy("wait_controller"):
            handle = self._learner.publish(partial(self._transport.publish, version))
            return replace(handle, probe=self._learner.probe())

    @in_group("weights")
    def read_weights(self, version: int, offset: int, num_bytes: int, delta: bool) -> UInt8:
        """UInt8 of a version's file, or of its delta, for a node that does not have it; safe beside everything else."""
        return self._transport.read(version, offset, num_bytes, delta=delta)

    def save(self, directory: str) -> None:
        """Begin to write a checkpoint's files."""
        with self._busy("wait_controller"):
            self._learner.save(directory)

    def await_saved(self) -> tuple[CheckpointFile, ...]:
        """See `Learner.await_saved`."""
        return self._learner.await_saved()

    def drain(self) -> ActorReport:
        """The spans since the last call, waits among them; safe beside `train`."""
        work = self._learner.drain()
        spans = [*work.spans, *self._waits.drain()]
        return ActorReport(spans=spans, events=[*work.events, *self._waits.losses()])

    def close(self) -> None:
        """See `Learner.close`."""
        self._learner.close()

    def _cap_memory(self) -> None:
        """On a GPU that an engine has a share of, too, fail where the plan ends and not where the engine comes back."""
        import torch

        own = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
        if 0 < own < 1 and self._turn is None and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1 - self._engine_share)

    @contextmanager
    def _busy(self, wait: Wait) -> Iterator[None]:
        """Give the time since the last call the name `wait`: every second of a rank has one."""
        self._waits.add(wait, self._idle_since, time.time())
        try:
            yield
        finally:
            self._idle_since = time.time()
