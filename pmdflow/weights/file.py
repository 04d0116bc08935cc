"""The weights of one version as a safetensors file that every process of a node maps, written block by block."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pmdflow.types import UInt8
from pmdflow.weights.blocks import BlockWriter, Summed

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Their names in a safetensors header."""


MADV_POPULATE_READ = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTensors:
    """Named tensors of known types and shapes, each of which is made when its turn comes."""

    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Type and shape by name, larger elements first: so each tensor of the file is aligned."""
    values: Iterable[Tensor]
    """The tensors in the order of `specs`, on any device; gone through once. Floating-point ones may be of another such
    type than the spec's: they are cast as they are written, where they are."""

    def skip(self) -> None:
        """Go through what is left of them."""
        for _ in self.values:
            pass

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> NamedTensors:
        """NamedTensors that there are already; of those that share memory (tied ones) the first."""
        first = {tensor.data_ptr(): name for name, tensor in reversed(list(weights.items()))}
        names = aligned({name: weights[name].dtype for name in weights if name in set(first.values())})
        specs = {name: (weights[name].dtype, tuple(weights[name].shape)) for name in names}
        return cls(specs=specs, values=(weights[name] for name in names))


def aligned(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The names in the order of a version's file, where each tensor begins at a multiple of its element's size."""
    return sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))


class Layout:
    """Where the tensors of a safetensors file lie."""

    def __init__(self, tensors: NamedTensors) -> None:
        """Of a file of these.

        Raises:
            ValueError: a type that the format does not have.
        """
        self._tensors, self._places = tensors, list[int]()
        entries, at = {}, 0
        for name, (dtype, shape) in tensors.specs.items():
            if dtype not in DTYPES:
                raise ValueError(f"{name} is of {dtype}, which no safetensors file holds")
            end = at + dtype.itemsize * torch.Size(shape).numel()
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            self._places.append(at)
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self._header) + at
        """Of the file."""

    def write(self, writer: BlockWriter, begin: int, end: int) -> Summed:
        """Write bytes `begin` to `end`, where blocks begin, and go through all tensors; the sum of these bytes.

        Raises:
            ValueError: a tensor is not of its type and shape.
            OSError: there is no room.
        """
        header = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        writer.write(header[begin:end])
        for (name, (dtype, shape)), at, tensor in zip(
            self._tensors.specs.items(), self._places, self._tensors.values, strict=True
        ):
            is_castable = tensor.is_floating_point() and dtype.is_floating_point
            if tuple(tensor.shape) != shape or not (is_castable or tensor.dtype == dtype):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
            first = max(begin - len(self._header) - at, 0) // dtype.itemsize
            last = max(end - len(self._header) - at, 0) // dtype.itemsize
            writer.write(tensor.reshape(-1)[first:last].to(dtype))
        return writer.finish()


def write_file(file: int, tensors: NamedTensors) -> str:
    """Write tensors as safetensors to the descriptor `file`; the digest of its bytes.

    Raises:
        ValueError: a type that the format does not have, or a tensor that is not of its type and shape.
        OSError: there is no room for it.
    """
    layout = Layout(tensors)
    return layout.write(BlockWriter(file), 0, layout.num_bytes).hex()


class Delta:
    """The open file of records that make a version's file, or a share of it, of the version before it."""

    def __init__(self, descriptor: int) -> None:
        """Own the descriptor."""
        self.descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        """Lets the file go; so does dropping this object."""

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return os.fstat(self.descriptor).st_size

    def records(self) -> UInt8:
        """Its bytes, mapped."""
        if not self.num_bytes:  # of equal weights
            return np.zeros(0, np.uint8)
        return np.memmap(f"/proc/self/fd/{self.descriptor}", np.uint8, "r")


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
        self._mapping = _Mapping()
        self.close = weakref.finalize(self, _close, descriptor, self._mapping)
        """Lets the file go; so does dropping this object."""
        self.delta: Delta | None = None
        """What makes it of the version before it."""
        self._names: dict[str, None] = {}

    @classmethod
    def write(cls, tensors: NamedTensors) -> WeightsFile:
        """Write tensors into memory of the node, which has no name."""
        return cls.make(lambda descriptor: write_file(descriptor, tensors))

    @classmethod
    def make(cls, write: Callable[[int], str]) -> WeightsFile:
        """A file in memory of the node that `write` fills, which answers with its digest."""
        descriptor = os.memfd_create("pmdflow-weights")
        try:
            return cls(descriptor, write(descriptor))
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def empty(cls, num_bytes: int) -> WeightsFile:
        """A file in memory of the node that is to be filled, and has no digest yet."""
        file = cls(os.memfd_create("pmdflow-weights"), "")
        os.ftruncate(file.descriptor, num_bytes)
        return file

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

    def populate(self) -> None:
        """Map every page now, which takes a third of the time that reading them one by one for the first time does."""
        self._map()
        self._mapping.advise(MADV_POPULATE_READ)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._map():
            raise KeyError(name)
        tensor: Tensor = self._mapping.tensors.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._map())

    def __len__(self) -> int:
        return len(self._map())

    def _map(self) -> dict[str, None]:
        if self._mapping.tensors is None:
            opened: Any = safe_open(self.path, framework="pt", device="cpu")
            self._names, self._mapping.tensors = dict.fromkeys(opened.keys()), opened
            some = next((tensor for tensor in map(opened.get_tensor, self._names) if tensor.nbytes), None)
            if some is not None:
                self._mapping.find(some.data_ptr(), inode=os.fstat(self.descriptor).st_ino)
        return self._names


class _Mapping:
    """What safetensors has mapped of a file."""

    tensors: Any = None
    begin = num_bytes = 0
    """Its addresses; none if they are not known."""

    def find(self, address: int, *, inode: int) -> None:
        """It is the mapping of that file that has `address` in it: what is beside it is somebody else's."""
        with open("/proc/self/maps") as lines:
            for line in lines:
                bounds, _, _, _, of, *_ = line.split()
                begin, end = (int(bound, 16) for bound in bounds.split("-"))
                if begin <= address < end and int(of) == inode:
                    self.begin, self.num_bytes = begin, end - begin

    def advise(self, advice: int) -> None:
        """Tell the kernel, with the interpreter's lock let go; one that does not know the advice does nothing."""
        ctypes.CDLL(None).madvise(ctypes.c_void_p(self.begin), ctypes.c_size_t(self.num_bytes), advice)


def _close(descriptor: int, mapping: _Mapping) -> None:
    """Let pages, mapping and file go, in this order: safetensors unmaps with the interpreter's lock held.

    With its pages that takes a second for 2 GiB, in which nothing is generated.
    """
    if mapping.num_bytes:
        mapping.advise(mmap.MADV_DONTNEED)
    mapping.tensors = None
    os.close(descriptor)
