"""UInt8 of a version's file in blocks, which are copied, summed and written without the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 4 << 20
"""What is copied, summed and written at a time, without the interpreter's lock."""
PRIME = 0x100000001B3


class Summed(NamedTuple):
    """What some blocks of a file that follow each other have in common with no others: see `hex`.

    Example:
        >>> front, back = Summed(words=3, num_bytes=BLOCK_BYTES), Summed(words=4, num_bytes=9)
        >>> front.then(back) == Summed(words=3 * PRIME + 4, num_bytes=BLOCK_BYTES + 9)
        True
    """

    words: int
    """Sum of their words, each times its place."""
    num_bytes: int
    """How many there are; only the last block of a file is not full."""

    def then(self, after: Summed) -> Summed:
        """Both, one after the other."""
        shift = pow(PRIME, -(-after.num_bytes // BLOCK_BYTES), 1 << 64)
        return Summed((self.words * shift + after.words) % (1 << 64), self.num_bytes + after.num_bytes)

    def hex(self) -> str:
        """The digest, if these are all blocks of a file: it changes with any byte, with their order and number."""
        return f"{(self.words * PRIME + self.num_bytes) % (1 << 64):016x}"


class Summer:
    """Sums blocks as they come."""

    def __init__(self) -> None:
        """Of no bytes yet."""
        self._odd = torch.arange(1, BLOCK_BYTES // 4, 2, dtype=torch.int64)
        self.summed = Summed(0, 0)
        """Of the blocks until now."""

    def add(self, block: Tensor, count: int) -> None:
        """Take the next `count` bytes in a block on the CPU, of which only the last of all is filled up with zeros."""
        words = int(torch.dot(block.view(torch.int64), self._odd))
        self.summed = self.summed.then(Summed(words % (1 << 64), count))


class BlockWriter:
    """Writes bytes of tensors to a file by way of one block (pinned for those of an accelerator), and sums them."""

    def __init__(self, file: int, *, at: int = 0, then: Callable[[Tensor], None] | None = None) -> None:
        """Write to the descriptor `file` from `at` on, and show each block to `then`; the last is filled up with zeros.

        `at` is where a block of the file begins.
        """
        self._file, self._at, self._then = file, at, then
        self._block = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
        self._filled = 0
        self._summer = Summer()

    def begin(self, at: int) -> None:
        """Go on at another place, and with another sum."""
        self._at, self._summer.summed = at, Summed(0, 0)

    def write(self, tensor: Tensor) -> None:
        """Append the bytes of a tensor."""
        if tensor.is_cuda and not self._block.is_pinned():
            self._block = self._block.pin_memory()
        left = tensor.contiguous().reshape(-1).view(torch.uint8)
        while len(left):
            count = min(len(left), BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + count].copy_(left[:count])
            self._filled += count
            left = left[count:]
            if self._filled == BLOCK_BYTES:
                self._flush()

    def finish(self) -> Summed:
        """Write what is left; the sum of all since the beginning."""
        if self._filled:
            self._block[self._filled :] = 0
            self._flush()
        return self._summer.summed

    def _flush(self) -> None:
        bytes_: Any = self._block.numpy()
        left = memoryview(bytes_)[: self._filled]
        while left:
            count = os.pwrite(self._file, left, self._at)
            self._at, left = self._at + count, left[count:]
        self._summer.add(self._block, self._filled)
        if self._then is not None:
            self._then(self._block)
        self._filled = 0


def read_block(file: int, block: Tensor, at: int) -> int:
    """Fill a block with the bytes of an open file from `at` on, and zeros beyond its end; how many bytes there were."""
    bytes_: Any = block.numpy()
    view, count = memoryview(bytes_), 0
    while count < BLOCK_BYTES and (more := os.preadv(file, [view[count:]], at + count)):
        count += more
    block[count:] = 0
    return count


def digest_of(file: int) -> str:
    """The digest of the bytes of an open file."""
    summer, block, at = Summer(), torch.zeros(BLOCK_BYTES, dtype=torch.uint8), 0
    while count := read_block(file, block, at):
        summer.add(block, count)
        at += count
    return summer.summed.hex()
