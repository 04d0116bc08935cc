"""Whole weights in shared memory, for an engine whose workers are processes of this machine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor


class StagedWeights:
    """A safetensors file in anonymous shared memory, which vanishes with this process, whatever ends it.

    Example:
        >>> staged = StagedWeights({"norm.weight": torch.ones(4)})
        >>> safetensors.torch.load_file(staged.path)["norm.weight"]
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Write `weights`; of tensors that share memory (tied ones) the first is written."""
        names = {tensor.data_ptr(): name for name, tensor in reversed(list(weights.items()))}
        unique = {name: weights[name].contiguous() for name in names.values()}
        self._file = os.memfd_create("pmdflow-weights")
        self.close = weakref.finalize(self, os.close, self._file)
        """Lets the memory go; so does dropping this object."""
        with open(self._file, "wb", closefd=False) as file:
            file.write(safetensors.torch.save(unique))

    @property
    def path(self) -> str:
        """Where other processes of this user can open it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"
