"""The weights of one version as a safetensors file that every process of a node maps, written block by block."""

from __future__ import annotations

import json
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
from pmdflow.weights.blocks import BlockWriter
from pmdflow.weights.delta import DeltaWriter

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Their names in a safetensors header."""


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
    """The names in the order of a version's file, where each tensor begins at a multiple of its element's size."""
    return sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))


def write_file(file: int, tensors: NamedTensors, *, then: Callable[[Tensor], None] | None = None) -> str:
    """Write tensors as safetensors to the descriptor `file`, and show its blocks to `then`; the digest of its bytes.

    Raises:
        ValueError: a type that the format does not have, or a tensor that is not of its type and shape.
        OSError: there is no room for it.
    """
    writer = BlockWriter(file, then=then)
    writer.write(torch.frombuffer(bytearray(_header(tensors.specs)), dtype=torch.uint8))
    for (name, spec), tensor in zip(tensors.specs.items(), tensors.values, strict=True):
        if (tensor.dtype, tuple(tensor.shape)) != spec:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {spec[0]} {spec[1]}")
        writer.write(tensor)
    return writer.finish()


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


class Delta:
    """The open file of records that make a version's file of another one."""

    def __init__(self, *, descriptor: int, base: str) -> None:
        """Own the descriptor; `base` is the digest of that other file."""
        self.descriptor = descriptor
        self.base = base
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
        self.close = weakref.finalize(self, os.close, descriptor)
        """Lets the file go; so does dropping this object."""
        self.delta: Delta | None = None
        """What makes it of the version before it."""
        self._mapped: Any = None
        self._names: dict[str, None] = {}

    @classmethod
    def write(cls, tensors: NamedTensors, base: WeightsFile | None = None) -> WeightsFile:
        """Write tensors into memory of the node, which has no name; with its delta from `base`, if that is shorter."""
        if base is None:
            return cls.make(lambda descriptor: write_file(descriptor, tensors))
        changes = DeltaWriter(base.descriptor)
        delta = Delta(descriptor=changes.descriptor, base=base.digest)
        file = cls.make(lambda descriptor: write_file(descriptor, tensors, then=changes.add))
        is_alike = os.fstat(file.descriptor).st_size == os.fstat(base.descriptor).st_size
        file.delta = delta if changes.is_short and is_alike else None
        return file

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
