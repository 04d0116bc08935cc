"""The weights in a checkpoint, without learner ranks, as they would be published."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from pmdflow.config.schema import LoraConfig
from pmdflow.learner.lora import published_name, published_scale

_MODEL = "model."


def checkpoint_weights(directory: Path, *, lora: LoraConfig | None, tied: bool) -> dict[str, Tensor]:
    """Read the policy of a committed checkpoint on the CPU, whatever number of ranks wrote it.

    Args:
        directory: The checkpoint's files.
        lora: The settings if the run trains adapters: then only these are read, for `AdapterMerger`.
        tied: Whether the output head is the embedding, so that one name suffices.
    """
    reader = FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    model: dict[str, Any] = {
        name.removeprefix(_MODEL): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what no_dist asks for
        load_state({"model": model}, storage_reader=reader, no_dist=True)
    weights = {}
    for name, tensor in model.items():
        plain = name.removeprefix(_MODEL)  # the policy holds the model as `model`
        published = plain if lora is None else published_name(plain)
        if published is not None and not (tied and published == "lm_head.weight"):
            weights[published] = tensor * (1.0 if lora is None else published_scale(published, lora))
    return weights
