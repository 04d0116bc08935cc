"""How large a model is, read from its folder's file headers without loading it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What memory estimates need to know of a model."""

    num_parameters: int
    kv_numbers_per_token: int
    """Numbers that one token adds to a sequence's KV cache, over all layers."""
    vocab_size: int


def measure_model(folder: Path | str) -> ModelSize | None:
    """Read the sizes of the Hugging Face model in `folder`; None if there is none, or it is of another layout."""
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = settings.get("text_config", settings)
        heads = settings["num_attention_heads"]
        head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
        kv_heads = settings.get("num_key_value_heads") or heads
        if not files:
            return None
        return ModelSize(
            num_parameters=sum(map(_count_parameters, files)),
            kv_numbers_per_token=2 * settings["num_hidden_layers"] * kv_heads * head_dim,
            vocab_size=settings["vocab_size"],
        )
    except (OSError, ValueError, KeyError):
        return None


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: `dtype`, `shape` and `data_offsets` by tensor name.

    Raises:
        ValueError: it is no such file, or shorter than its header says, as a broken download is.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            header: dict[str, Any] = json.loads(stream.read(length)) if 0 < length <= size else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; fetch it again") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if not header or size < end:
        raise ValueError(f"{file} has {size:,} bytes of {end:,}: it is not whole; fetch it again")
    return header


def _count_parameters(file: Path) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in read_header(file).values())
