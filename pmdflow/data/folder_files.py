"""Files of a model folder that go on, byte for byte, with a model that is made from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates",
)  # fmt: skip
"""What transformers and vLLM read a tokenizer and its templates from."""
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""What must go on with a model that was made from another."""


def copy_files(model: Path, folder: Path, patterns: Iterable[str]) -> None:
    """Copy those of a model folder that match; what has the same name is replaced."""
    for pattern in patterns:
        for path in model.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)
