"""What the tensors of a causal language model are called in memory, and in a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from pmdflow.errors import PmdflowError


class Layout:
    """The tensors of a model folder, without their numbers.

    A folder holds some of them in other pieces than the model in memory: the experts of a mixture one by one, tied
    weights once.

    Example:
        >>> layout = Layout(Path("configs/tiny-arithmetic"), dtype=torch.bfloat16)       # doctest: +SKIP
        >>> layout.stored["model.norm.weight"].dtype                                     # doctest: +SKIP
        torch.bfloat16
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype) -> None:
        """Build the model of `folder` without memory for its tensors.

        Raises:
            PmdflowError: the folder's weights cannot be written one tensor after another.
        """
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self._dtype = dtype
        self._float32 = tuple(self._model._keep_in_fp32_modules_strict or ())
        state = dict(_untied(self._model.state_dict(keep_vars=True)))
        self.pieces: Mapping[str, Mapping[str, Tensor]] = {
            name: self.store(name, tensor) for name, tensor in state.items()
        }
        """By name in memory: what is stored of that tensor, as tensors without memory."""
        self.stored: Mapping[str, Tensor] = {
            key: value for piece in self.pieces.values() for key, value in piece.items()
        }
        """What the folder holds, in the order of `pieces`."""
        together = {name: tensor.shape for name, tensor in revert_weight_conversion(self._model, state).items()}
        if together != {name: tensor.shape for name, tensor in self.stored.items()}:
            raise PmdflowError(
                f"{type(self._model).__name__} stores several of its tensors as one: it cannot be written one by one",
                hint="`pmdflow.open_run(RUN).checkpoint().model().save_pretrained(OUT)` does it in memory",
            )
        self.shapes: Mapping[str, torch.Size] = {name: tensor.shape for name, tensor in state.items()}
        """By name in memory; of tied names only the first."""

    def store(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What a folder holds of the tensor `name`: copies in the type of the export."""
        pieces = revert_weight_conversion(self._model, {name: tensor.detach()})
        return {
            key: piece.to(self.dtype_of(key, piece), memory_format=torch.contiguous_format, copy=True)
            for key, piece in pieces.items()
        }

    def dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """The type in which a tensor is stored: transformers keeps some in float32, and whole numbers as they are."""
        if not tensor.is_floating_point():
            return tensor.dtype
        kept = any(f".{part}." in f".{name}." for part in self._float32)
        return torch.float32 if kept else self._dtype


def _untied(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
