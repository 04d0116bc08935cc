"""Trained claims as immutable zarr v3 parts in the run directory: flat values and run lengths, a table a level.

`archive/part-000012.zarr` is the claim of iteration 12, written aside, synced and renamed, so a part that has its
final name is whole. Any zarr or xarray reads it without pmdflow.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from pmdflow import durable
from pmdflow.errors import PmdflowError
from pmdflow.types import Int64, TrainBatch

FORMAT = "pmdflow-rollouts/1"
CHUNK_ROWS = 1 << 16
SHARD_ROWS = 1 << 22

_NAME = re.compile(r"part-(\d{6,})\.zarr")
_ZSTD_LEVEL = 3

Table = dict[str, npt.NDArray[Any]]


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


def write_part(run_dir: str | Path, batch: TrainBatch, *, attrs: Mapping[str, Any]) -> Path:
    """Archive one claim durably; repeating it is harmless.

    A complete part of the same content is kept. One of other content is replaced: after a resume from an older
    checkpoint the iteration was trained again, and only the surviving claim counts.

    Args:
        run_dir: The run directory.
        batch: The claim as it was trained.
        attrs: Further attributes, such as model, tokenizer hash and LSN range; JSON types.

    Raises:
        PmdflowError: the part cannot be written; names it and the remedy.
    """
    path = part_path(run_dir, batch.iteration)
    aside = path.with_name(path.name + ".tmp")
    digest = _digest(batch)
    try:
        if not (path.is_dir() and read_attrs(path).get("digest") == digest):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            _write_tables(aside, batch, {**attrs, "digest": digest})
            durable.sync_tree(aside)
            _replace(aside, path)
        _catalog_append(path, batch, digest)
    except OSError as error:
        raise PmdflowError(
            f"cannot archive iteration {batch.iteration} at {path}: {error.strerror or error}; free space on the "
            "disk of the run directory, then start the same `pmdflow up` again: it resumes and repeats the part"
        ) from error
    return path


def read_part(path: str | Path) -> TrainBatch:
    """Read a part back, equal bit for bit to the batch that was written.

    Raises:
        PmdflowError: not a part, or of a format this version does not know.
    """
    attrs = read_attrs(path)
    token, segment = read_table(path, "token"), read_table(path, "segment")
    trajectory, group = read_table(path, "trajectory"), read_table(path, "group")
    lengths = segment["length"]
    prompts = np.repeat(np.array([str(prompt) for prompt in group["prompt_id"]], dtype=object), group["size"])
    components = trajectory.get("components", np.empty((len(prompts), 0)))
    return TrainBatch(
        iteration=int(attrs["iteration"]),
        version=int(attrs["version"]),
        tokens=token["id"],
        logprobs=token["logprob"],
        versions=np.repeat(segment["policy_version"], lengths),
        temperatures=np.repeat(segment["temperature"], lengths),
        mask=token["mask"],
        cu_seqlens=trajectory["token_offset"],
        prompt_lengths=trajectory["prompt_length"],
        groups=trajectory["group"],
        trajectories=trajectory["id"],
        rewards=trajectory["reward"],
        components={name: np.ascontiguousarray(components[:, i]) for i, name in enumerate(attrs["components"])},
        stops=trajectory["stop"],
        prompt_ids=tuple(prompts.tolist()),
    )


def open_part(path: str | Path) -> zarr.Group:
    """Open a part for reading single arrays.

    Raises:
        PmdflowError: as in `read_part`.
    """
    try:
        root = zarr.open_group(str(path), mode="r", zarr_format=3, use_consolidated=False)
    except (OSError, ValueError, KeyError) as error:
        raise PmdflowError(f"{path} is not a readable archive part: {error}") from error
    if root.attrs.get("format") != FORMAT:
        raise PmdflowError(
            f"{path} has the format {root.attrs.get('format')!r}; this version reads {FORMAT!r}: use the pmdflow "
            "that wrote it"
        )
    return root


def read_attrs(path: str | Path) -> dict[str, Any]:
    """The attributes of a part: format, model, iteration, version and what `write_part` was given."""
    return dict(open_part(path).attrs)


def read_table(path: str | Path, name: str, columns: Sequence[str] | None = None) -> Table:
    """Read whole columns of the table `token`, `segment`, `trajectory` or `group` (None: all of them)."""
    table = cast(zarr.Group, open_part(path)[name])
    wanted = sorted(table.array_keys()) if columns is None else columns
    return {column: np.asarray(cast(Any, table[column])[...]) for column in wanted}


def catalog(run_dir: str | Path) -> list[dict[str, Any]]:
    """One row for each complete part, by iteration; rows that the catalog file lacks are made from their parts."""
    rows = {row["part"]: row for row in _catalog_rows(Path(run_dir))}
    return [rows.get(path.name) or _row(path, read_part(path), read_attrs(path)["digest"]) for path in parts(run_dir)]


def _write_tables(path: Path, batch: TrainBatch, attrs: Mapping[str, Any]) -> None:
    root = zarr.create_group(
        store=str(path),
        zarr_format=3,
        attributes={
            "format": FORMAT,
            "Conventions": "CF-1.12",
            "iteration": batch.iteration,
            "version": batch.version,
            "components": list(batch.components),
            **attrs,
        },
    )
    starts = _segment_starts(batch)
    _write_table(root, "token", {"id": batch.tokens, "logprob": batch.logprobs, "mask": batch.mask})
    _write_table(root, "segment", _segment_columns(batch, starts), counted={"length": "token"})
    _write_table(root, "trajectory", _trajectory_columns(batch, starts), counted={"num_segments": "segment"})
    _write_table(root, "group", _group_columns(batch), counted={"size": "trajectory"})


def _segment_starts(batch: TrainBatch) -> Int64:
    """First token of every segment: where trajectory, policy version or temperature changes."""
    total = len(batch.tokens)
    if total == 0:
        return np.empty(0, np.int64)
    temperatures = batch.temperatures.view(np.uint32)  # bits, so that any value round-trips
    first = np.zeros(total, bool)
    first[batch.cu_seqlens[:-1][np.diff(batch.cu_seqlens) > 0]] = True
    first[1:] |= (np.diff(batch.versions) != 0) | (temperatures[1:] != temperatures[:-1])
    return np.flatnonzero(first).astype(np.int64)


def _segment_columns(batch: TrainBatch, starts: Int64) -> Table:
    lengths = np.diff(np.append(starts, len(batch.tokens))).astype(np.int32)
    stop = np.zeros(len(starts), np.uint8)
    filled = np.flatnonzero(np.diff(batch.cu_seqlens) > 0)
    last = np.searchsorted(starts, batch.cu_seqlens[1:][filled]) - 1
    stop[last] = batch.stops[filled]
    return {
        "length": lengths,
        "policy_version": batch.versions[starts],
        "temperature": batch.temperatures[starts],
        "stop": stop,
    }


def _trajectory_columns(batch: TrainBatch, starts: Int64) -> Table:
    count = len(batch.rewards)
    columns: Table = {
        "id": batch.trajectories,
        "group": batch.groups,
        "claim": np.full(count, batch.iteration, np.int64),
        "iteration": np.full(count, batch.iteration, np.int64),
        "order": np.arange(count, dtype=np.int32),
        "num_segments": np.diff(np.searchsorted(starts, batch.cu_seqlens)).astype(np.int32),
        "token_offset": batch.cu_seqlens,
        "prompt_length": batch.prompt_lengths,
        "reward": batch.rewards,
        "stop": batch.stops,
    }
    if batch.components:
        columns["components"] = np.column_stack(list(batch.components.values()))
    return columns


def _group_columns(batch: TrainBatch) -> Table:
    count = len(batch.groups)
    starts = np.flatnonzero(np.append(True, np.diff(batch.groups) != 0)) if count else np.empty(0, np.int64)
    ends = np.append(starts[1:], count) if count else starts
    prompt_ids = [batch.prompt_ids[start] for start in starts]
    for start, end, prompt in zip(starts, ends, prompt_ids, strict=True):
        if any(other != prompt for other in batch.prompt_ids[start:end]):
            raise ValueError(
                f"group {batch.groups[start]} of iteration {batch.iteration} has more than one prompt id: "
                "a group is one admission of one prompt"
            )
    bounds = zip(batch.cu_seqlens[starts], batch.cu_seqlens[ends], strict=True)
    generated = [versions[versions >= 0] for versions in (batch.versions[low:high] for low, high in bounds)]
    return {
        "id": batch.groups[starts],
        "prompt_id": np.array(prompt_ids, dtype=object),
        "size": (ends - starts).astype(np.int32),
        "first_version": np.array([v.min() if len(v) else -1 for v in generated], np.int32),
        "last_version": np.array([v.max() if len(v) else -1 for v in generated], np.int32),
    }


def _write_table(root: zarr.Group, name: str, columns: Table, counted: Mapping[str, str] | None = None) -> None:
    table = root.create_group(name)
    for column, values in columns.items():
        dimensions = [name] if column != "token_offset" else ["trajectory_boundary"]
        dimensions += ["component"] if values.ndim == 2 else []
        rows = max(1, min(CHUNK_ROWS, len(values)))
        sharded = len(values) > CHUNK_ROWS
        shard = min(SHARD_ROWS, -(-len(values) // rows) * rows)
        array = table.create_array(
            column,
            shape=values.shape,
            dtype="string" if values.dtype == object else values.dtype,
            chunks=(rows, *values.shape[1:]),
            shards=(shard, *values.shape[1:]) if sharded else None,
            compressors=[ZstdCodec(level=_ZSTD_LEVEL)],
            dimension_names=dimensions,
            attributes={"sample_dimension": counted[column]} if counted and column in counted else None,
            config={"write_empty_chunks": True},  # else -0.0 comes back as the fill value 0.0
        )
        if len(values):
            array[...] = values


def _digest(batch: TrainBatch) -> str:
    """Hash of everything in the batch, so that a repeat is told from a claim trained anew."""
    digest = hashlib.sha256()
    head = [batch.iteration, batch.version, list(batch.components), batch.prompt_ids]
    digest.update(json.dumps(head).encode())
    columns = [batch.tokens, batch.logprobs, batch.versions, batch.temperatures, batch.mask, batch.cu_seqlens]
    columns += [batch.prompt_lengths, batch.groups, batch.trajectories, batch.rewards, batch.stops]
    for values in (*columns, *batch.components.values()):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _replace(aside: Path, path: Path) -> None:
    superseded = path.with_name(path.name + ".old.tmp")
    shutil.rmtree(superseded, ignore_errors=True)
    if path.exists():
        path.rename(superseded)
    durable.rename(aside, path)
    shutil.rmtree(superseded, ignore_errors=True)


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


def _catalog_append(path: Path, batch: TrainBatch, digest: str) -> None:
    run_dir = path.parent.parent
    file = path.parent / "catalog.jsonl"
    if any(row["part"] == path.name and row["digest"] == digest for row in _catalog_rows(run_dir)):
        return
    text = file.read_bytes() if file.exists() else b""
    lead = b"" if not text or text.endswith(b"\n") else b"\n"  # a torn line stays a line of its own, and is skipped
    with open(file, "ab") as catalog_file:
        catalog_file.write(lead + json.dumps(_row(path, batch, digest)).encode() + b"\n")


def _catalog_rows(run_dir: Path) -> Iterator[dict[str, Any]]:
    file = run_dir / "archive" / "catalog.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"part", "digest"} <= row.keys():
            yield row
