"""How large a model is, read from its folder's file headers without loading it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path


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
        return ModelSize(
            num_parameters=sum(map(_count_parameters, files)),
            kv_numbers_per_token=2 * settings["num_hidden_layers"] * kv_heads * head_dim,
            vocab_size=settings["vocab_size"],
        )
    except (OSError, ValueError, KeyError):
        return None


def _count_parameters(file: Path) -> int:
    """Sum the sizes in a safetensors header: 8 bytes of length, then JSON of `shape` by name."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
