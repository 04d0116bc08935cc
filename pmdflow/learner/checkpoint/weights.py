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
        lora: The settings if the run trains adapters: then only these are read, for `AdapterMerger`.
        tied: Whether the output head is the embedding, so that one name suffices.
    """
    reader = FileSystemReader(directory)
    entries = policy_entries(reader)
    published = {name: name if lora is None else published_name(name) for name in entries}
    wanted = [name for name in entries if published[name] and not (tied and name == "lm_head.weight")]
    weights = {}
    for name, tensor in read_policy(reader, entries, wanted).items():
        public = published[name]
        assert public is not None, "the others are not wanted"
        weights[public] = tensor * (1.0 if lora is None else published_scale(public, lora))
    return weights


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
