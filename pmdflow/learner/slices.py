"""A model folder read by slices: a rank has the rows of each weight that FSDP2 gives it, and no other bytes of it."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_KEPT = "_pmdflow_rows"
"""Marks a parameter of which only the rank's rows are left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which of the ranks that shard a model among them this one is.

    Example:
        >>> Part(rank=1, ranks=4).rows(10)
        slice(3, 6, None)
    """

    rank: int
    ranks: int

    def rows(self, length: int) -> slice:
        """The rows of a weight of `length` rows that FSDP2 gives to this rank; none where it has fewer than ranks."""
        each = -(-length // self.ranks)
        return slice(min(self.rank * each, length), min((self.rank + 1) * each, length))


def load_part(folder: Path, part: Part, **settings: Any) -> Any:
    """The causal language model of a folder in float32, of whose weights only the rows of `part` are read and real.

    Each weight has its whole shape, so whatever is done to a model can be done before it is sharded; the other rows are
    memory that nobody has touched, which the system does not give away. A weight that transformers makes of several of
    the file's (the experts of a layer) is made whole on each rank before its rows are kept, one at a time.

    Args:
        folder: The model, whose keys `check_loading` has judged.
        part: Whose rows.
        settings: What else `from_pretrained` takes.
    """
    config = AutoConfig.from_pretrained(folder)
    with _one_at_a_time(), ExitStack() as files:
        if getattr(config, "quantization_config", None) is not None or not _is_sliceable(folder):
            with _only_rows(part):
                return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        names, state = _Names(empty), {}
        for path in _weight_files(folder):
            file = files.enter_context(safe_open(path, framework="pt", device="cpu"))  # maps it: rows alone are read
            for key in file.keys():  # noqa: SIM118
                entry = file.get_slice(key)
                state[key] = _Rows(entry, part) if names.is_plain(key) else entry
        with _only_rows(part):
            return type(empty).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32, **settings)


def _is_sliceable(folder: Path) -> bool:
    """Whether the folder has its weights in safetensors files of the usual names."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers reads: others beside them, such as averaged weights, are nobody's."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


class _Names:
    """Which keys of a file become a parameter of the model as they are."""

    def __init__(self, model: Any) -> None:
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        transforms: list[Any] = get_model_conversion_mapping(model)
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._renamings = [one for one in transforms if not isinstance(one, WeightConverter)]

    def is_plain(self, key: str) -> bool:
        name, converter = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        return converter is None and name in self._parameters


class _Rows:
    """Stands for a tensor of a file where transformers loads it: of whole shape, but read where the rank's rows are."""

    def __init__(self, entry: Any, part: Part) -> None:
        self._entry, self._part = entry, part

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        shape: list[int] = self._entry.get_shape()
        return shape

    def __getitem__(self, index: Any) -> Tensor:
        shape = self.get_shape()
        if not shape:
            whole: Tensor = self._entry[...]
            return whole.float()
        rows = self._part.rows(shape[0])
        return _untouched(shape, rows, self._entry[rows] if rows.stop > rows.start else None)


def _untouched(shape: list[int], rows: slice, values: Tensor | None) -> Tensor:
    """A float32 tensor that has `values` in `rows` and takes no memory elsewhere."""
    size = 4 * torch.Size(shape).numel()
    if not size:
        return torch.empty(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would be given for a row
    tensor = torch.frombuffer(memory, dtype=torch.float32).view(shape)
    if values is not None:
        tensor[rows] = values
    return tensor


@contextmanager
def _only_rows(part: Part) -> Iterator[None]:
    """Of whatever becomes a parameter meanwhile only the rank's rows keep their memory."""

    def keep(_module: nn.Module, _name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta or parameter.dtype != torch.float32 or not parameter.dim():
            return None
        if getattr(parameter, _KEPT, False):  # it is tied: a second name for it
            return None
        rows = part.rows(len(parameter))
        kept = nn.Parameter(_untouched(list(parameter.shape), rows, parameter.detach()[rows]), parameter.requires_grad)
        kept.__dict__.update(parameter.__dict__ | {_KEPT: True})  # transformers marks what it has loaded
        return kept

    handle = register_module_parameter_registration_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Without the loader's threads, which read ahead of what is kept."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
