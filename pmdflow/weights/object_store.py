"""Weights through memory: one file a node, whose bytes Ray's object store carries from node to node in pieces."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch.utils.dlpack import from_dlpack

from pmdflow.errors import PmdflowError, WaitTimeout, WeightsLost
from pmdflow.types import UInt8
from pmdflow.weights.blocks import BlockWriter
from pmdflow.weights.delta import patch, write_all
from pmdflow.weights.file import Delta, NamedTensors, WeightsFile
from pmdflow.weights.held import HeldFiles, NodeNotes, from_stored
from pmdflow.weights.transport import Base, Stored, WeightsHandle

PIECE_BYTES = 64 << 20
PIECE_TIMEOUT_S = 60.0
"""A process that has not given a piece by then is stopped or cut off: another one is asked."""


class ObjectStoreTransport:
    """Writes a version into memory of the learner's node; another node copies it once, from whoever has it.

    It is served by the process that published it and by all that fetched it: a version lives as long as one of them.
    """

    def __init__(self, run_dir: str, *, kept: int = 1, delta: bool = False, stored: Stored | None = None) -> None:
        """Move weights of the run in `run_dir`, on the node of this process; `kept` versions are live at a time.

        With `delta` a node that has the version before gets what changed since; the file of that version is in memory
        beside the new one until it is made. A version that nobody has any more may be `stored`.
        """
        self._stored = stored
        self._delta = delta
        self._held = HeldFiles(kept)
        self._notes = NodeNotes(run_dir, ray.get_runtime_context().get_node_id())
        self.received: Counter[str] = Counter()

    def publish(self, version: int, weights: NamedTensors) -> WeightsHandle:
        """Write all tensors, one after the other, into memory that vanishes with the last process that has it."""
        before = self._held.newest() if self._delta else None
        self._held.make_room()
        file = WeightsFile.write(weights, None if before is None else before[1])
        self._held.keep(version, file)
        self._notes.add(version, file)
        context = ray.get_runtime_context()
        publisher = None if context.get_actor_id() is None else context.current_actor
        base = None if before is None or file.delta is None else Base(version=before[0], digest=file.delta.base)
        return WeightsHandle(version=version, location=publisher, digest=file.digest, base=base)

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> WeightsFile:
        """The node's file of a version; made here if nobody on the node has it."""
        deadline = time.monotonic() + timeout_s
        own = self._held.get(handle.version)
        if own is not None and handle.digest in ("", own.digest):
            return own
        base = self._base(handle)
        self._held.make_room()
        with self._notes.alone(handle.version, timeout_s=timeout_s):
            file = self._notes.find(handle)
            if file is None and base is not None:
                file = self._patched(handle, base, deadline=deadline)
            if file is None:
                file = self._copied(handle, deadline=deadline)
            self._notes.add(handle.version, file)
        self._held.keep(handle.version, file)
        return file

    def read(self, version: int, offset: int, num_bytes: int, *, delta: bool = False) -> UInt8:
        """UInt8 of a version that this process has."""
        return self._held.read(version, offset, num_bytes, delta=delta)

    def _base(self, handle: WeightsHandle) -> WeightsFile | None:
        """The node's file of the version before; None if it has none, or there is no delta from it."""
        base = handle.base
        if base is None:
            return None
        own = self._held.get(base.version)
        if own is not None and own.digest == base.digest:
            return own
        return self._notes.find(WeightsHandle(version=base.version, location=None, digest=base.digest))

    def _patched(self, handle: WeightsHandle, base: WeightsFile, *, deadline: float) -> WeightsFile | None:
        """The file, made of the node's file of the version before; None if that does not give what was published."""

        def copy(other: Any) -> WeightsFile:
            delta = Delta(descriptor=os.memfd_create("pmdflow-delta"), base=base.digest)
            for piece in _pieces(handle, other, delta=True, deadline=deadline):
                write_all(delta.descriptor, piece)
            self.received["fetched_bytes"] += delta.num_bytes
            file = WeightsFile.make(lambda descriptor: patch(base.descriptor, delta.records(), into=descriptor))
            file.delta = delta
            return file

        try:
            file = self._from_others(handle, copy, deadline=deadline)
        except WeightsLost:  # they have the file only
            return None
        self.received["fetched_deltas"] += file.digest == handle.digest
        return file if file.digest == handle.digest else None

    def _copied(self, handle: WeightsHandle, *, deadline: float) -> WeightsFile:
        """The whole file from the others, each until it fails; then out of a checkpoint.

        Raises:
            PmdflowError: it arrived with another digest.
        """

        def copy(other: Any) -> WeightsFile:
            def write(descriptor: int) -> str:
                writer = BlockWriter(descriptor)
                for piece in _pieces(handle, other, delta=False, deadline=deadline):
                    self.received["fetched_bytes"] += len(piece)
                    writer.write(from_dlpack(piece))  # what is read-only comes without a copy
                return writer.finish()

            return WeightsFile.make(write)

        try:
            file = self._from_others(handle, copy, deadline=deadline)
        except WeightsLost as error:
            return from_stored(self._stored, handle, str(error))
        if handle.digest not in ("", file.digest):
            raise PmdflowError(
                f"weights of version {handle.version} arrived with the digest {file.digest}, published was "
                f"{handle.digest}: bytes were lost or changed on the way"
            )
        return file

    def _from_others(
        self, handle: WeightsHandle, copy: Callable[[Any], WeightsFile], *, deadline: float
    ) -> WeightsFile:
        """What `copy` gets from one of those that have a version.

        Raises:
            WeightsLost: nobody has it.
            WaitTimeout: it did not arrive in time.
        """
        problem: BaseException | None = None
        for other in [*random.sample(handle.peers, len(handle.peers)), handle.location]:
            if other is None:
                continue
            try:
                return copy(other)
            except GetTimeoutError as error:
                if time.monotonic() > deadline:
                    raise WaitTimeout(f"weights of version {handle.version} did not arrive in time") from error
                problem = error
            except RayError as error:  # it has died, or does not have that version any more
                problem = error.cause if isinstance(error, RayTaskError) else error
        raise WeightsLost(f"those that had them died ({problem or 'nobody gives them out'})")


def _pieces(handle: WeightsHandle, other: Any, *, delta: bool, deadline: float) -> Iterator[UInt8]:
    """The bytes of a version's file, or of its delta, as another process gives them."""
    at = 0
    while True:
        asked = other.read_weights.remote(handle.version, at, PIECE_BYTES, delta)
        piece: UInt8 = ray.get(asked, timeout=min(max(deadline - time.monotonic(), 0.0), PIECE_TIMEOUT_S))
        if not len(piece):
            return
        yield piece
        at += len(piece)
