"""The weights in a checkpoint, without learner ranks, as they would be published."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from pmdflow.config.schema import LoraConfig
from pmdflow.learner.lora import published_name, published_scale

_POLICY = "model.model."
"""Before the name of a tensor of the language model: the part of the state that is the policy, and its module."""

Entries = Mapping[str, TensorStorageMetadata]
"""What a checkpoint holds of the policy, by the name in the language model (of an adapter: in peft's)."""


def checkpoint_weights(directory: Path, *, lora: LoraConfig | None, tied: bool) -> dict[str, Tensor]:
    """Read the policy of a committed checkpoint on the CPU, whatever number of ranks wrote it.

    Args:
        directory: The checkpoint's files.
        lora: The settings if the run trains adapters: then only these are read.
        tied: Whether the output head is the embedding, so that one name suffices.
    """
    published = Published(directory, lora=lora, tied=tied)
    return {name: published.read(name) for name in published.specs}


class Published:
    """What a learner publishes, out of a committed checkpoint, in the type that it trains in.

    Example:
        >>> published = Published(Path("runs/a/checkpoints/iteration-000010"), lora=None, tied=True)   # doctest: +SKIP
        >>> published.read("model.norm.weight").dtype                                                  # doctest: +SKIP
        torch.float32
    """

    def __init__(self, directory: Path, *, lora: LoraConfig | None, tied: bool) -> None:
        """As `checkpoint_weights`."""
        self._reader, self._lora = FileSystemReader(directory), lora
        self._entries = policy_entries(self._reader)
        self._own: dict[str, str] = {}
        for own in self._entries:
            public = own if lora is None else published_name(own)
            if public is not None and not (tied and own == "lm_head.weight"):
                self._own[public] = own
        entries = {name: self._entries[own] for name, own in self._own.items()}
        self.specs = {name: (entry.properties.dtype, tuple(entry.size)) for name, entry in entries.items()}
        """Type and shape by the name that is published."""

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        own = self._own[name]
        tensor = read_policy(self._reader, self._entries, [own])[own]
        return tensor if self._lora is None else tensor * published_scale(name, self._lora)


def policy_entries(reader: FileSystemReader) -> Entries:
    """What the checkpoint holds of the policy."""
    entries = reader.read_metadata().state_dict_metadata
    return {
        name.removeprefix(_POLICY): entry
        for name, entry in entries.items()
        if name.startswith(_POLICY) and isinstance(entry, TensorStorageMetadata)
    }


def read_policy(reader: FileSystemReader, entries: Entries, names: Iterable[str]) -> dict[str, Tensor]:
    """Read whole tensors on the CPU, in the type that they were written in."""
    tensors: dict[str, Any] = {
        _POLICY + name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in names
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what no_dist asks for
        load_state(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(_POLICY): tensor for name, tensor in tensors.items()}
