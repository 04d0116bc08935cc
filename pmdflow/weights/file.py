"""The weights of one version as a safetensors file that every process of a node maps, written block by block."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

BLOCK_BYTES = 4 << 20
"""What is copied, summed and written at a time, without the interpreter's lock."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Their names in a safetensors header."""
PRIME = 0x100000001B3


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTensors:
    """Named tensors of known types and shapes, each of which is made when its turn comes."""

    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Type and shape by name, larger elements first: so each tensor of the file is aligned."""
    values: Iterable[Tensor]
    """The tensors in the order of `specs`, on any device; gone through once."""

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> NamedTensors:
        """NamedTensors that there are already; of those that share memory (tied ones) the first."""
        first = {tensor.data_ptr(): name for name, tensor in reversed(list(weights.items()))}
        names = aligned({name: weights[name].dtype for name in weights if name in set(first.values())})
        specs = {name: (weights[name].dtype, tuple(weights[name].shape)) for name in names}
        return cls(specs=specs, values=(weights[name] for name in names))


def aligned(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The names in an order in which each tensor begins at a multiple of its element's size."""
    return sorted(dtypes, key=lambda name: -dtypes[name].itemsize)


class Digest:
    """A number that bytes have, whoever read them: it changes with any of them and with their order.

    Example:
        >>> digest = Digest()
        >>> digest.add(torch.zeros(BLOCK_BYTES, dtype=torch.uint8))
        >>> digest.hex()
        '0000000000000000'
    """

    def __init__(self) -> None:
        """Of no bytes yet."""
        self._odd = torch.arange(1, BLOCK_BYTES // 4, 2, dtype=torch.int64)
        self._sum = 0

    def add(self, block: Tensor) -> None:
        """Take the next `BLOCK_BYTES` bytes on the CPU; the last ones of all are filled up with zeros."""
        words = int(torch.dot(block.view(torch.int64), self._odd))
        self._sum = (self._sum * PRIME + words) % (1 << 64)

    def hex(self) -> str:
        """The number."""
        return f"{self._sum:016x}"


class BlockWriter:
    """Writes bytes of tensors to a file by way of one block (pinned for those of an accelerator), and sums them."""

    def __init__(self, file: int) -> None:
        """Write to the descriptor `file`."""
        self._file = file
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
        self._digest.add(self._block)
        self._filled = 0


def write_file(file: int, tensors: NamedTensors) -> str:
    """Write tensors as safetensors to the descriptor `file`; the digest of its bytes.

    Raises:
        ValueError: a type that the format does not have, or a tensor that is not of its type and shape.
        OSError: there is no room for it.
    """
    writer = BlockWriter(file)
    writer.write(torch.frombuffer(bytearray(_header(tensors.specs)), dtype=torch.uint8))
    for (name, spec), tensor in zip(tensors.specs.items(), tensors.values, strict=True):
        if (tensor.dtype, tuple(tensor.shape)) != spec:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {spec[0]} {spec[1]}")
        writer.write(tensor)
    return writer.finish()


def digest_of(file: int) -> str:
    """The digest of the bytes of an open file."""
    digest, block, at = Digest(), torch.zeros(BLOCK_BYTES, dtype=torch.uint8), 0
    bytes_: Any = block.numpy()
    view = memoryview(bytes_)
    while count := os.preadv(file, [view], at):
        while count < BLOCK_BYTES and (more := os.preadv(file, [view[count:]], at + count)):
            count += more
        block[count:] = 0
        digest.add(block)
        at += count
    return digest.hex()


def _header(specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    entries, at = {}, 0
    for name, (dtype, shape) in specs.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name} is of {dtype}, which no safetensors file holds")
        end = at + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class WeightsFile(Mapping[str, Tensor]):
    """An open safetensors file, mapped: its tensors are views, which nobody may write to.

    The bytes live as long as any process has the file open or mapped, whatever becomes of its name.

    Example:
        >>> file = WeightsFile.write(NamedTensors.of({"norm.weight": torch.ones(4)}))
        >>> safetensors.torch.load_file(file.path)["norm.weight"], file["norm.weight"]
        (tensor([1., 1., 1., 1.]), tensor([1., 1., 1., 1.]))
    """

    def __init__(self, descriptor: int, digest: str) -> None:
        """Own an open file whose digest is known."""
        self.descriptor = descriptor
        self.digest = digest
        self.close = weakref.finalize(self, os.close, descriptor)
        """Lets the file go; so does dropping this object."""
        self._mapped: Any = None
        self._names: dict[str, None] = {}

    @classmethod
    def write(cls, tensors: NamedTensors) -> WeightsFile:
        """Write tensors into memory of the node, which has no name."""
        descriptor = os.memfd_create("pmdflow-weights")
        try:
            return cls(descriptor, write_file(descriptor, tensors))
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, path: str | Path, digest: str) -> WeightsFile:
        """Open a file whose digest is known.

        Raises:
            OSError: it cannot be opened.
        """
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), digest)

    @property
    def path(self) -> str:
        """Where other processes of this user and node can open it."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._map():
            raise KeyError(name)
        tensor: Tensor = self._mapped.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._map())

    def __len__(self) -> int:
        return len(self._map())

    def _map(self) -> dict[str, None]:
        if self._mapped is None:
            self._mapped = safe_open(self.path, framework="pt", device="cpu")
            self._names = dict.fromkeys(self._mapped.keys())
        return self._names
