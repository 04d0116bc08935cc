"""UInt8 of a version's file in blocks, which are copied, summed and written without the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 4 << 20
"""What is copied, summed and written at a time, without the interpreter's lock."""
PRIME = 0x100000001B3


class Digest:
    """A number that bytes have, whoever read them: it changes with any of them, with their order and their number.

    Example:
        >>> digest = Digest()
        >>> digest.add(torch.zeros(BLOCK_BYTES, dtype=torch.uint8), 7)
        >>> digest.hex()
        '0000000000000007'
    """

    def __init__(self) -> None:
        """Of no bytes yet."""
        self._odd = torch.arange(1, BLOCK_BYTES // 4, 2, dtype=torch.int64)
        self._sum = self._num_bytes = 0

    def add(self, block: Tensor, count: int) -> None:
        """Take the next `count` bytes in a block on the CPU, of which only the last of all is filled up with zeros."""
        words = int(torch.dot(block.view(torch.int64), self._odd))
        self._sum = (self._sum * PRIME + words) % (1 << 64)
        self._num_bytes += count

    def hex(self) -> str:
        """The number."""
        return f"{(self._sum * PRIME + self._num_bytes) % (1 << 64):016x}"


class BlockWriter:
    """Writes bytes of tensors to a file by way of one block (pinned for those of an accelerator), and sums them."""

    def __init__(self, file: int, *, then: Callable[[Tensor], None] | None = None) -> None:
        """Write to the descriptor `file`, and show each block to `then`; the last is filled up with zeros."""
        self._file, self._then = file, then
        self._block = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
        self._filled = 0
        self._digest = Digest()

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

    def finish(self) -> str:
        """Write what is left; the digest of all."""
        if self._filled:
            self._block[self._filled :] = 0
            self._flush()
        return self._digest.hex()

    def _flush(self) -> None:
        bytes_: Any = self._block.numpy()
        left = memoryview(bytes_)[: self._filled]
        while left:
            left = left[os.write(self._file, left) :]
        self._digest.add(self._block, self._filled)
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
    digest, block, at = Digest(), torch.zeros(BLOCK_BYTES, dtype=torch.uint8), 0
    while count := read_block(file, block, at):
        digest.add(block, count)
        at += count
    return digest.hex()
