"""What the files of a folder are known by, and which of them have changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pmdflow.config.model_size import read_header

NUM_SAMPLES, SAMPLE_BYTES, SAMPLES = 256, 4096, " (samples)"
"""Of a file of weights: pieces that tell it from another of the same shape, and what their key ends with."""
WEIGHTS = (".safetensors", ".bin", ".index.json")
"""What the names of files end with that hold weights, or say which file holds them."""


def fingerprint(folder: Path, *, weights: bool = True) -> dict[str, str]:
    """SHA-256 of every file of the folder that is no weights; of those that are, of size, header and samples.

    Samples are `NUM_SAMPLES` pieces from all over a file, under a key of their own: weights that were trained on
    differ everywhere, and to read all of a large model takes minutes. Without `weights` their files are left out.

    Raises:
        ValueError: a file of weights is torn.
    """
    found = {}
    for path in sorted(file for file in folder.iterdir() if file.is_file()):
        if not weights and path.name.endswith(WEIGHTS):
            continue
        if path.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken"):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".safetensors":
            header = json.dumps(read_header(path), sort_keys=True)
            found[path.name] = hashlib.sha256(f"{path.stat().st_size} {header}".encode()).hexdigest()
        if path.suffix in (".safetensors", ".bin"):
            found[f"{path.name}{SAMPLES}"] = _sample(path)
    return found


def changed_files(folder: Path, recorded: Mapping[str, str], *, weights: bool = True) -> list[str]:
    """Names of the files that are not as `fingerprint` recorded them, gone or new ones too.

    Raises:
        ValueError: a file of weights is torn.
    """
    now = fingerprint(folder, weights=weights)
    files = {key: key.removesuffix(SAMPLES) for key in (*recorded, *now)}
    known = {key: name for key, name in files.items() if key in recorded or not key.endswith(SAMPLES)}
    compared = {key: name for key, name in known.items() if weights or not name.endswith(WEIGHTS)}
    return sorted({name for key, name in compared.items() if recorded.get(key) != now.get(key)})


def _sample(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for number in range(NUM_SAMPLES):
            file.seek(max(size - SAMPLE_BYTES, 0) * number // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
