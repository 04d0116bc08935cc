"""A version's file in equal shares: each learner rank casts, sums and writes one; the ranks of a node into one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

from pmdflow.errors import PmdflowError
from pmdflow.weights.blocks import BLOCK_BYTES, BlockWriter, Summed
from pmdflow.weights.delta import DeltaWriter
from pmdflow.weights.file import Delta, Layout, NamedTensors, WeightsFile

Made = TypeVar("Made")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The learner ranks, of which this process is one."""

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    """What all ranks give, by rank. Every rank must call."""

    def agree(self, make: Callable[[], Made]) -> list[Made]:
        """What each rank makes, by rank. Every rank must call; if one fails, all do.

        Raises:
            PmdflowError: it failed at a rank, which is named.
        """
        made, failure = None, None
        try:
            made = make()
        except Exception as error:
            failure = error
        gathered = self.gather((made, failure and f"learner rank {self.rank}: {type(failure).__name__}: {failure}"))
        for _, why in gathered:
            if why is not None:
                raise PmdflowError(why) from failure
        return [value for value, _ in gathered]


ALONE = Ranks()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFile:
    """Where the other processes of a node find a file in its memory."""

    node: str
    path: str
    inode: int

    def is_of(self, node: str, file: WeightsFile) -> bool:
        """Whether it is this open file of that node."""
        return self.node == node and self.inode == os.fstat(file.descriptor).st_ino

    def open(self) -> WeightsFile | None:
        """The file, whose digest is not known; None if whoever has the path does not live any more."""
        try:
            file = WeightsFile(os.open(self.path, os.O_RDWR | os.O_CLOEXEC), "")
        except OSError:
            return None
        return file if self.is_of(self.node, file) else None  # else the process id is another's


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process gives out of a version."""

    holder: Any
    """An actor with `read_weights`; None: nobody can ask it."""
    begin: int
    end: int
    """Which bytes of the file."""
    summed: Summed
    delta_bytes: int | None
    """Of the records of the blocks between them; None: it has no delta."""
    file: NodeFile
    """What the bytes were written into."""


def all_of(shares: Sequence[Share], holder: Any) -> Share:
    """What one process gives out that has all of them."""
    records = [share.delta_bytes for share in shares]
    return Share(
        holder=holder,
        begin=0,
        end=shares[-1].end,
        summed=reduce(Summed.then, [share.summed for share in shares]),
        delta_bytes=None if None in records else sum(count or 0 for count in records),
        file=shares[0].file,
    )


def digest_of_shares(shares: list[Summed]) -> str:
    """The digest of a file that is made of these."""
    return reduce(Summed.then, shares).hex()


def write_shares(
    tensors: NamedTensors, ranks: Ranks, *, node: str, holder: Any, base: WeightsFile | None
) -> tuple[WeightsFile, tuple[Share, ...]]:
    """Write the share of this rank. Every rank must call, with the same tensors.

    Args:
        tensors: Gone through to the end, also if writing fails: gathering them is a collective.
        ranks: The writers.
        node: Name of this node, which no other has.
        holder: Who gives out the share.
        base: The version before, to make a delta from; the ranks have the same or none.

    Returns:
        The node's file, which has only the shares of the ranks of this node, and all shares that are not empty.

    Raises:
        PmdflowError: a rank failed, which is named; all do then.
    """
    layout = Layout(tensors)
    file, place = _file_of_node(layout.num_bytes, ranks, node)
    begin, end = (_boundary(rank, ranks.count, layout.num_bytes) for rank in (ranks.rank, ranks.rank + 1))

    def write() -> Share:
        changes = None
        try:
            if base is not None and os.fstat(base.descriptor).st_size == layout.num_bytes:
                changes = DeltaWriter(base.descriptor, begin=begin, end=end)
                file.delta = Delta(changes.descriptor)
            writer = BlockWriter(file.descriptor, at=begin, then=None if changes is None else changes.add)
            summed = layout.write(writer, begin, end)
        finally:
            tensors.skip()
        delta_bytes = changes.num_bytes if changes is not None and changes.is_short else None
        return Share(holder=holder, begin=begin, end=end, summed=summed, delta_bytes=delta_bytes, file=place)

    shares = [share for share in ranks.agree(write) if share.begin < share.end]
    if any(share.delta_bytes is None for share in shares):
        file.delta = None
    file.digest = digest_of_shares([share.summed for share in shares])
    return file, tuple(shares)


def _boundary(rank: int, count: int, num_bytes: int) -> int:
    """Where the share of a rank begins, which is where a block does."""
    blocks = -(-num_bytes // BLOCK_BYTES)
    return min(blocks * rank // count * BLOCK_BYTES, num_bytes)


def _file_of_node(num_bytes: int, ranks: Ranks, node: str) -> tuple[WeightsFile, NodeFile]:
    """An empty file of so many bytes, made by the first rank of each node, which the others of the node open."""
    first = ranks.gather(node).index(node)
    own: list[WeightsFile] = []

    def make() -> NodeFile | None:
        if ranks.rank != first:
            return None
        own.append(WeightsFile.empty(num_bytes))
        return NodeFile(node=node, path=own[0].path, inode=os.fstat(own[0].descriptor).st_ino)

    def open_it() -> None:
        if not own:
            found = place.open()
            if found is None:
                raise PmdflowError(f"{place.path} of learner rank {first}, on the same node, cannot be opened")
            own.append(found)

    made = ranks.agree(make)[first]
    assert made is not None
    place: NodeFile = made
    ranks.agree(open_it)
    return own[0], place
