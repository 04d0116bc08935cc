"""Names of archive parts, and the catalog: one row a part, so that nobody opens a part to learn what it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pmdflow.store.archive.reading import read_attrs, read_part
from pmdflow.types import TrainBatch

_NAME = re.compile(r"part-(\d{6,})\.zarr")


def part_path(run_dir: str | Path, iteration: int) -> Path:
    """Where the claim of `iteration` is archived."""
    return Path(run_dir) / "archive" / f"part-{iteration:06d}.zarr"


def parts(run_dir: str | Path) -> list[Path]:
    """The complete parts of a run, by iteration; leftovers of a crash are not among them."""
    directory = Path(run_dir) / "archive"
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=part_iteration)


def part_iteration(path: Path) -> int:
    """The iteration whose claim a part holds, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like an archive part: expected part-NNNNNN.zarr")
    return int(match[1])


def is_archived(run_dir: str | Path, iteration: int, *, claim_lsn: int) -> bool:
    """Whether the part of `iteration` holds the claim that was recorded at `claim_lsn`, so that nobody need read it."""
    path = part_path(run_dir, iteration)
    return path.is_dir() and read_attrs(path).get("claim_lsn") == claim_lsn


def catalog(run_dir: str | Path) -> list[dict[str, Any]]:
    """One row for each complete part, by iteration; rows that the catalog file lacks are made from their parts."""
    rows = {row["part"]: row for row in _catalog_rows(Path(run_dir))}
    return [rows.get(path.name) or _row(path, read_part(path), read_attrs(path)["digest"]) for path in parts(run_dir)]


def append_to_catalog(path: Path, batch: TrainBatch, digest: str) -> None:
    """Add the row of a part, unless the catalog has it already."""
    run_dir = path.parent.parent
    file = path.parent / "catalog.jsonl"
    if any(row["part"] == path.name and row["digest"] == digest for row in _catalog_rows(run_dir)):
        return
    text = file.read_bytes() if file.exists() else b""
    lead = b"" if not text or text.endswith(b"\n") else b"\n"  # a torn line stays a line of its own, and is skipped
    with open(file, "ab") as catalog_file:
        catalog_file.write(lead + json.dumps(_row(path, batch, digest)).encode() + b"\n")


def _row(path: Path, batch: TrainBatch, digest: str) -> dict[str, Any]:
    return {
        "part": path.name,
        "iteration": batch.iteration,
        "version": batch.version,
        "groups": len(np.unique(batch.groups)),
        "trajectories": len(batch.rewards),
        "tokens": len(batch.tokens),
        "reward_mean": float(np.mean(batch.rewards)) if len(batch.rewards) else None,
        "digest": digest,
    }


def _catalog_rows(run_dir: Path) -> Iterator[dict[str, Any]]:
    file = run_dir / "archive" / "catalog.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"part", "digest"} <= row.keys():
            yield row
