"""What stands beside the weights in a Hugging Face folder: configuration, tokenizer, chat template, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pmdflow.data.tokenizer import end_ids

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates",
)  # fmt: skip
"""What transformers and vLLM read a tokenizer and its templates from."""
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""What must go on with a model that was made from another."""


def copy_tokenizer(model: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and licence, byte for byte; nothing else of the model folder is taken along."""
    for pattern in (*TOKENIZER_FILES, *LEGAL_FILES):
        for path in model.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)


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
