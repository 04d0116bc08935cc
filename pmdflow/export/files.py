"""What an export writes beside the weights: configuration and generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pmdflow.data.tokenizer import end_ids


def write_config(model: Path, folder: Path, *, dtype: str) -> None:
    """The model's `config.json` as it was written, so that every version of transformers that read it still does.

    Only the type of the weights is changed, and a path that transformers may have noted is left out.
    """
    values: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    for section in (values, values.get("text_config") or {}):
        for key in ("torch_dtype", "dtype"):
            if key in section:
                section[key] = dtype
    if "torch_dtype" not in values:
        values["dtype"] = dtype
    _write(folder / "config.json", values)


def write_generation_config(model: Path, folder: Path) -> None:
    """The model's `generation_config.json`, with every id that ended a sequence in the run."""
    path = model / "generation_config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = sorted(end_ids(str(model)))
    _write(folder / "generation_config.json", {**values, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
