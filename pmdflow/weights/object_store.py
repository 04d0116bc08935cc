"""Weights through memory: one file a node, whose bytes Ray's object store carries from node to node in pieces."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch.utils.dlpack import from_dlpack

from pmdflow.errors import PmdflowError, WaitTimeout, WeightsLost
from pmdflow.weights.file import BlockWriter, NamedTensors, WeightsFile
from pmdflow.weights.held import HeldFiles, NodeNotes
from pmdflow.weights.transport import Bytes, WeightsHandle

PIECE_BYTES = 64 << 20


class ObjectStoreTransport:
    """Writes a version into memory of the learner's node; another node copies it once, from whoever has it.

    It is served by the process that published it and by all that fetched it: a version lives as long as one of them.
    """

    def __init__(self, run_dir: str, *, kept: int = 1) -> None:
        """Move weights of the run in `run_dir`, on the node of this process; `kept` versions are live at a time."""
        self._held = HeldFiles(kept)
        self._notes = NodeNotes(run_dir, ray.get_runtime_context().get_node_id())

    def publish(self, version: int, weights: NamedTensors) -> WeightsHandle:
        """Write all tensors, one after the other, into memory that vanishes with the last process that has it."""
        self._held.make_room()
        file = WeightsFile.write(weights)
        self._held.keep(version, file)
        self._notes.add(version, file)
        context = ray.get_runtime_context()
        publisher = None if context.get_actor_id() is None else context.current_actor
        return WeightsHandle(version=version, location=publisher, digest=file.digest)

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> WeightsFile:
        """The node's file of a version; made here if nobody on the node has it."""
        deadline = time.monotonic() + timeout_s
        own = self._held.get(handle.version)
        if own is not None and own.digest == handle.digest:
            return own
        self._held.make_room()
        with self._notes.alone(handle.version, timeout_s=timeout_s):
            file = self._notes.find(handle)
            if file is None:
                file = self._copy(handle, deadline=deadline)
            self._notes.add(handle.version, file)
        self._held.keep(handle.version, file)
        return file

    def read(self, version: int, offset: int, num_bytes: int) -> Bytes:
        """Bytes of a version that this process has."""
        return self._held.read(version, offset, num_bytes)

    def _copy(self, handle: WeightsHandle, *, deadline: float) -> WeightsFile:
        """Ask the others for the bytes, each until it fails."""
        others = [*random.sample(handle.peers, len(handle.peers)), handle.location]
        problem: BaseException | None = None
        for other in others:
            if other is None:
                continue
            try:
                return _copied(handle, other, deadline=deadline)
            except GetTimeoutError as error:
                raise WaitTimeout(f"weights of version {handle.version} did not arrive in time") from error
            except RayError as error:  # it has died, or does not have that version any more
                problem = error.cause if isinstance(error, RayTaskError) else error
        raise WeightsLost(
            f"weights of version {handle.version} died with those that had them: {problem or 'nobody gives them out'}"
        )


def _copied(handle: WeightsHandle, other: Any, *, deadline: float) -> WeightsFile:
    descriptor, at = os.memfd_create("pmdflow-weights"), 0
    try:
        writer = BlockWriter(descriptor)
        while True:
            asked = other.read_weights.remote(handle.version, at, PIECE_BYTES)
            piece = ray.get(asked, timeout=max(deadline - time.monotonic(), 0.0))
            if not len(piece):
                break
            writer.write(from_dlpack(piece))  # what is read-only comes without a copy
            at += len(piece)
        digest = writer.finish()
        if digest != handle.digest:
            raise PmdflowError(
                f"weights of version {handle.version} arrived with the digest {digest}, published was {handle.digest}: "
                "bytes were lost or changed on the way"
            )
        return WeightsFile(descriptor, digest)
    except BaseException:
        os.close(descriptor)
        raise
