"""A claim written as one archive part: aside, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from pmdflow import durable
from pmdflow.errors import PmdflowError
from pmdflow.store.archive.parts import append_to_catalog, part_path
from pmdflow.store.archive.reading import FORMAT, Table, read_attrs
from pmdflow.types import Int64, TrainBatch

CHUNK_ROWS, SHARD_ROWS = 1 << 16, 1 << 22
_ZSTD_LEVEL = 3


def write_part(
    run_dir: str | Path, batch: TrainBatch, *, attrs: Mapping[str, Any], claim_lsn: int | None = None
) -> Path:
    """Archive one claim durably; repeating it is harmless.

    A complete part of the same claim is kept. One of another is replaced: after a resume from an older checkpoint the
    iteration was trained again, and only the surviving claim counts.

    Args:
        run_dir: The run directory.
        batch: The claim as it was trained.
        attrs: Further attributes, such as model and tokenizer hash; JSON types.
        claim_lsn: LSN of the claim's record in the store, by which `is_archived` knows the part; None if unknown.

    Raises:
        PmdflowError: the part cannot be written; names it.
    """
    path = part_path(run_dir, batch.iteration)
    aside = path.with_name(path.name + ".tmp")
    identity: dict[str, Any] = {"digest": _digest(batch)} | ({} if claim_lsn is None else {"claim_lsn": claim_lsn})
    try:
        if not (path.is_dir() and _holds(read_attrs(path), identity, _plan_attrs(batch))):
            durable.make_directories(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
            _write_tables(aside, batch, {**attrs, **identity})
            durable.sync_tree(aside)
            _replace(aside, path)
        append_to_catalog(path, batch, identity["digest"])
    except OSError as error:
        raise PmdflowError(
            f"cannot archive iteration {batch.iteration} at {path}: {error.strerror or error}",
            hint="free space on the disk of the run directory, then start the same `pmdflow up` again: it resumes and "
            "repeats the part",
        ) from error
    return path


def _write_tables(path: Path, batch: TrainBatch, attrs: Mapping[str, Any]) -> None:
    restored = {str(version): trained for version, trained in batch.restored.items()}
    root = zarr.create_group(
        store=str(path),
        zarr_format=3,
        attributes={
            "format": FORMAT,
            "Conventions": "CF-1.12",
            "iteration": batch.iteration,
            "version": batch.version,
            "components": list(batch.components),
            **_plan_attrs(batch),
            **({"restored": restored} if restored else {}),
            **({"turn_rewards": _names_said(batch)} if batch.turns else {}),
            **attrs,
        },
    )
    starts = _segment_starts(batch)
    _write_table(root, "token", {"id": batch.tokens, "logprob": batch.logprobs, "mask": batch.mask})
    _write_table(root, "segment", _segment_columns(batch, starts), counted={"length": "token"})
    _write_table(root, "trajectory", _trajectory_columns(batch, starts), counted={"num_segments": "segment"})
    _write_table(root, "group", _group_columns(batch), counted={"size": "trajectory"})
    if batch.turns:
        _write_table(root, "turn", _turn_columns(batch))
    for name, columns in (("token_extra", batch.extra), ("trajectory_extra", batch.trajectory_extra)):
        if columns:
            _write_table(root, name, columns, rows=name.removesuffix("_extra"))


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
    if batch.branches is not None:
        columns["episode"] = batch.branches.episodes
        columns["parent"] = batch.branches.parents
        columns["fork_offset"] = batch.branches.fork_offsets
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
    plan: Table = {} if batch.plan is None else {"step": batch.plan.steps}
    bounds = zip(batch.cu_seqlens[starts], batch.cu_seqlens[ends], strict=True)
    generated = [versions[versions >= 0] for versions in (batch.versions[low:high] for low, high in bounds)]
    return {
        "id": batch.groups[starts],
        "prompt_id": np.array(prompt_ids, dtype=object),
        "size": (ends - starts).astype(np.int32),
        "first_version": np.array([v.min() if len(v) else -1 for v in generated], np.int32),
        "last_version": np.array([v.max() if len(v) else -1 for v in generated], np.int32),
        **plan,
    }


def _names_said(batch: TrainBatch) -> list[str]:
    return sorted({name for _, _, rewards, _ in batch.turns for name in rewards})


def _turn_columns(batch: TrainBatch) -> Table:
    rows, offsets, rewards, keys = zip(*batch.turns, strict=True)
    said = [[own.get(name, np.nan) for name in _names_said(batch)] for own in rewards]
    return {
        "trajectory": np.array(rows, np.int64),
        "offset": np.array(offsets, np.int32),
        "rewards": np.array(said, np.float64).reshape(len(rows), -1),
        "key": np.array([key or "" for key in keys], dtype=object),
    }


def _holds(attrs: Mapping[str, Any], identity: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    """Whether a part is the claim's; of one older than plans nobody knows today how it was dealt to steps."""
    return identity.items() <= attrs.items() and ("plan" not in attrs or plan.items() <= attrs.items())


def _plan_attrs(batch: TrainBatch) -> dict[str, Any]:
    """What says, beside the step of each group, how the claim was dealt to steps."""
    plan = batch.plan
    return {} if plan is None else {"plan": {"rule": plan.rule, "seed": plan.seed, "steps": plan.num_steps}}


def _write_table(
    root: zarr.Group,
    name: str,
    columns: Mapping[str, Any],
    counted: Mapping[str, str] | None = None,
    rows: str | None = None,
) -> None:
    """Write a table whose rows are `rows`; None: they have its name."""
    table = root.create_group(name)
    for column, values in columns.items():
        dimensions = [rows or name] if column != "token_offset" else ["trajectory_boundary"]
        inner = [f"{column}_{axis}" for axis in range(1, values.ndim)]
        dimensions += ["component"] if column == "components" else inner
        chunk = max(1, min(CHUNK_ROWS, len(values)))
        sharded = len(values) > CHUNK_ROWS
        shard = min(SHARD_ROWS, -(-len(values) // chunk) * chunk)
        array = table.create_array(
            column,
            shape=values.shape,
            dtype="string" if values.dtype == object else values.dtype,
            chunks=(chunk, *values.shape[1:]),
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
    if batch.branches is not None:
        columns += [batch.branches.episodes, batch.branches.parents, batch.branches.fork_offsets]
    if batch.turns:
        digest.update(json.dumps([(*note[:2], sorted(note[2].items()), note[3]) for note in batch.turns]).encode())
    extras = [*batch.extra.items(), *batch.trajectory_extra.items()]
    if extras:
        digest.update(json.dumps([(name, values.dtype.str, values.shape) for name, values in extras]).encode())
    for values in (*columns, *batch.components.values(), *(values for _, values in extras)):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _replace(aside: Path, path: Path) -> None:
    superseded = path.with_name(path.name + ".old.tmp")
    shutil.rmtree(superseded, ignore_errors=True)
    if path.exists():
        path.rename(superseded)
    durable.rename(aside, path)
    shutil.rmtree(superseded, ignore_errors=True)
