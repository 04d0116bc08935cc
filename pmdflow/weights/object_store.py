"""Weights through memory: one file a node, whose bytes Ray's object store carries from node to node in pieces.

No learner rank has the whole model: each writes a share and gives it out, and a node asks all of them in turn.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch.utils.dlpack import from_dlpack

from pmdflow.errors import WaitTimeout, WeightsDamaged, WeightsLost
from pmdflow.types import UInt8
from pmdflow.weights.blocks import BlockWriter, Summed
from pmdflow.weights.delta import patch
from pmdflow.weights.file import Delta, NamedTensors, WeightsFile
from pmdflow.weights.held import HeldFiles, NodeNotes, from_stored
from pmdflow.weights.shares import ALONE, NodeFile, Ranks, Share, all_of, digest_of_shares, write_shares
from pmdflow.weights.transport import Base, Stored, WeightsHandle

PIECE_BYTES = 64 << 20
PIECE_TIMEOUT_S = 60.0
"""A process that has not given a piece by then is stopped or cut off: another one is asked."""
AHEAD = 2
"""Pieces that are on the way while one is written."""


class ObjectStoreTransport:
    """Writes a version into memory of the learner's nodes; another node copies it once, from whoever has it.

    It is served by the ranks that published it and by all that fetched it: a version lives as long as one of these, or
    all of those.
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

    def publish(self, version: int, weights: NamedTensors, ranks: Ranks = ALONE) -> WeightsHandle:
        """Write this rank's share of all tensors into memory that vanishes with the last process that has it."""
        before = self._held.newest() if self._delta else None
        self._held.make_room()
        context = ray.get_runtime_context()
        file, shares = write_shares(
            weights,
            ranks,
            node=self._notes.node,
            holder=None if context.get_actor_id() is None else context.current_actor,
            base=None if before is None else before[1],
        )
        self._held.keep(version, file)
        if all(share.file.is_of(self._notes.node, file) for share in shares):
            with suppress(OSError):  # without a note a node fetches what it has
                self._notes.add(version, file)
        base = None if before is None or file.delta is None else Base(version=before[0], digest=before[1].digest)
        return WeightsHandle(version=version, location=shares, digest=file.digest, base=base)

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> WeightsFile:
        """The node's file of a version; made here if nobody on the node has it."""
        deadline = time.monotonic() + timeout_s
        own = self._held.get(handle.version)
        if own is not None and handle.digest in ("", own.digest):
            return own
        base = self._base(handle)
        self._held.make_room()
        with self._notes.alone(handle.version, timeout_s=timeout_s / 2):
            file = self._notes.find(handle)
            if file is None and base is not None and self._place(handle) is None:
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

        def copy(peer: Any) -> WeightsFile:
            shares = handle.location if peer is None else [all_of(handle.location, peer)]
            delta = Delta(os.memfd_create("pmdflow-delta"))
            for at, piece in self._pieces(handle.version, shares, delta=True, deadline=deadline):
                bytes_: Any = piece
                os.pwrite(delta.descriptor, bytes_, at)
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
            WeightsDamaged: it arrived with another digest.
        """

        def copy(peer: Any) -> WeightsFile:
            file, summed = self._begun(handle)
            missing = [share for share in handle.location if share.begin not in summed]
            asked = missing if peer is None else [replace(share, holder=peer) for share in missing]
            writer = BlockWriter(file.descriptor)
            for at, piece in self._pieces(handle.version, asked, delta=False, deadline=deadline):
                writer.begin(at)
                writer.write(from_dlpack(piece))  # what is read-only comes without a copy
                summed[at] = writer.finish()
            file.digest = digest_of_shares([summed[at] for at in sorted(summed)])
            return file

        try:
            file = self._from_others(handle, copy, deadline=deadline)
        except WeightsLost as error:
            return from_stored(self._stored, handle, str(error))
        if handle.digest not in ("", file.digest):
            raise WeightsDamaged(
                f"weights of version {handle.version} arrived with the digest {file.digest}, published was "
                f"{handle.digest}: bytes were lost or changed on the way"
            )
        return file

    def _place(self, handle: WeightsHandle) -> NodeFile | None:
        """The file that learner ranks of this node have begun."""
        places = (share.file for share in handle.location or ())
        return next((place for place in places if place.node == self._notes.node), None)

    def _begun(self, handle: WeightsHandle) -> tuple[WeightsFile, dict[int, Summed]]:
        """That file, and the shares that are in it by where they begin; a new one if there is none."""
        place = self._place(handle)
        file = None if place is None else place.open()
        if file is None:
            return WeightsFile.empty(handle.location[-1].end), {}
        return file, {share.begin: share.summed for share in handle.location if share.file == place}

    def _from_others(
        self, handle: WeightsHandle, copy: Callable[[Any], WeightsFile], *, deadline: float
    ) -> WeightsFile:
        """What `copy` makes of what a peer gives, or of what the learner's ranks give together: then it gets None.

        Raises:
            WeightsLost: nobody has it.
            WaitTimeout: it did not arrive in time.
        """
        problem: BaseException | None = None
        shares: Sequence[Share] = handle.location or ()
        peers = random.sample(handle.peers, len(handle.peers)) if shares else []
        is_given_out = bool(shares) and all(share.holder is not None for share in shares)
        for peer in [*peers, None] if is_given_out else peers:
            try:
                return copy(peer)
            except GetTimeoutError as error:
                if time.monotonic() > deadline:
                    raise WaitTimeout(f"weights of version {handle.version} did not arrive in time") from error
                problem = error
            except RayError as error:  # it has died, or does not have that version any more
                problem = error.cause if isinstance(error, RayTaskError) else error
        raise WeightsLost(f"those that had them died ({problem or 'nobody gives them out'})")

    def _pieces(
        self, version: int, shares: Sequence[Share], *, delta: bool, deadline: float
    ) -> Iterator[tuple[int, UInt8]]:
        """Where each piece goes, and its bytes: of the file, or of its records, which follow each other by share.

        All holders are asked in turn, and some pieces are on the way while one is used.
        """
        asked: deque[_Asked] = deque()

        def oldest() -> tuple[int, UInt8]:
            next_ = asked.popleft()
            piece: UInt8 = ray.get(next_.piece, timeout=min(max(deadline - time.monotonic(), 0.0), PIECE_TIMEOUT_S))
            self.received["fetched_bytes"] += len(piece)
            return next_.at, piece

        for holder, begin, at, count in _in_turn(shares, delta=delta):
            asked.append(_Asked(at, holder.read_weights.remote(version, begin, count, delta)))
            if len(asked) > AHEAD:
                yield oldest()
        while asked:
            yield oldest()


class _Asked(NamedTuple):
    """A piece that is on its way."""

    at: int
    piece: Any


def _in_turn(shares: Sequence[Share], *, delta: bool) -> Iterator[tuple[Any, int, int, int]]:
    """Holder of each piece, where it begins there, where it goes and how long it is; one of each share in turn."""
    lists, before = [], 0
    for share in shares:
        first, length = (0, share.delta_bytes or 0) if delta else (share.begin, share.end - share.begin)
        goes = before - first if delta else 0
        before += length
        lists.append(
            [
                (share.holder, begin, begin + goes, min(PIECE_BYTES, first + length - begin))
                for begin in range(first, first + length, PIECE_BYTES)
            ]
        )
    return (piece for row in zip_longest(*lists) for piece in row if piece is not None)
