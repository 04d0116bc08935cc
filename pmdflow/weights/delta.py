"""What a version's file has other than the one before it: the words of two bytes that changed, and where they are.

At the learning rates of language models a step moves few weights by as much as a unit in the last place of bfloat16.
A record is of one block of the file: its number, how many words of each page changed, their places in the pages, and
what they are now; or the whole block where that is shorter. Blocks without a change have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmdflow.types import UInt8
from pmdflow.weights.blocks import BLOCK_BYTES, BlockWriter, read_block

PAGE_WORDS = 1 << 16
"""A place in a page takes two bytes."""
PAGES = BLOCK_BYTES // (2 * PAGE_WORDS)
HEAD = np.dtype([("block", "<u4"), ("is_whole", "<u4"), ("counts", "<u4", (PAGES,))])


class DeltaWriter:
    """Compares the blocks of a new file with those of its base as they are written.

    Example:
        >>> delta = DeltaWriter(base, begin=0, end=size)       # doctest: +SKIP
        >>> writer = BlockWriter(new, then=delta.add)          # doctest: +SKIP
    """

    def __init__(self, base: int, *, begin: int, end: int) -> None:
        """Compare with bytes `begin` to `end` of the open file `base` and write records to memory of the node."""
        self._base, self._most = base, (end - begin) // 2
        self.descriptor = os.memfd_create("pmdflow-delta")
        """The records; whoever takes it closes it."""
        self.num_bytes = 0
        """Of all records; more than half of the bytes is not worth its while, and no more are made then."""
        self._block = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
        self._number = begin // BLOCK_BYTES

    def add(self, block: Tensor) -> None:
        """Take the next block of the new file."""
        if not self.is_short:
            return
        read_block(self._base, self._block, self._number * BLOCK_BYTES)
        new, old = block.view(torch.int16), self._block.view(torch.int16)
        # Four words at a time first: most are as they were.
        wide = (block.view(torch.int64) != self._block.view(torch.int64)).nonzero()[:, 0]
        narrow = (new.view(-1, 4)[wide] != old.view(-1, 4)[wide]).nonzero()
        places = 4 * wide[narrow[:, 0]] + narrow[:, 1]
        if len(places):
            head = np.zeros(1, HEAD)
            head["block"], head["is_whole"] = self._number, 2 * len(places) > len(new)
            head["counts"] = torch.bincount(places // PAGE_WORDS, minlength=PAGES).numpy()
            changed = [(places % PAGE_WORDS).to(torch.uint16).numpy(), new[places].numpy()]
            for part in [head, *([new.numpy()] if head["is_whole"] else changed)]:
                self.num_bytes += write_all(self.descriptor, part)
        self._number += 1

    @property
    def is_short(self) -> bool:
        """Whether there is less to carry than the bytes."""
        return self.num_bytes <= self._most


def patch(base: int, delta: UInt8, *, into: int) -> str:
    """Write the file that a delta makes of its base to the descriptor `into`; the digest of its bytes."""
    writer, size = BlockWriter(into), os.fstat(base).st_size
    block, records = torch.zeros(BLOCK_BYTES, dtype=torch.uint8), _records(delta)
    next_number, change = next(records, (-1, None))
    for number in range(-(-size // BLOCK_BYTES)):
        read_block(base, block, number * BLOCK_BYTES)
        if number == next_number and change is not None:
            places, words = change
            block.view(torch.int16)[places] = words
            next_number, change = next(records, (-1, None))
        writer.write(block[: size - number * BLOCK_BYTES])
    return writer.finish().hex()


def _records(delta: UInt8) -> Iterator[tuple[int, tuple[Any, Tensor]]]:
    """Number, places and words of each block that changed."""
    at = 0

    def take(dtype: Any, count: int) -> np.ndarray[Any, Any]:
        nonlocal at
        part = np.frombuffer(delta, dtype, count, at)
        at += part.nbytes
        return part

    while at < len(delta):
        (head,) = take(HEAD, 1)
        if head["is_whole"]:
            yield int(head["block"]), (slice(None), torch.from_numpy(take("<i2", BLOCK_BYTES // 2).copy()))
            continue
        count = int(head["counts"].sum())
        pages = np.repeat(np.arange(PAGES, dtype=np.int64) * PAGE_WORDS, head["counts"])
        places = torch.from_numpy(pages + take("<u2", count))
        yield int(head["block"]), (places, torch.from_numpy(take("<i2", count).copy()))


def write_all(file: int, part: np.ndarray[Any, Any]) -> int:
    """Write an array to the descriptor `file`; its bytes."""
    bytes_: Any = part
    left = memoryview(bytes_).cast("B")
    while left:
        left = left[os.write(file, left) :]
    return part.nbytes
