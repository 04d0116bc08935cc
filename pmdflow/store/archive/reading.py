"""Archive parts read back, whole or column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr

from pmdflow.errors import PmdflowError
from pmdflow.types import Branches, ClaimPlan, TrainBatch, TurnRow

FORMAT = "pmdflow-rollouts/1"

Table = dict[str, npt.NDArray[Any]]
"""Columns by name."""


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
        plan=_plan(attrs, group),
        branches=_branches(trajectory),
        restored={int(version): trained for version, trained in attrs.get("restored", {}).items()},
        turns=_turns(path, attrs),
        extra=_extra(path, "token_extra"),
        trajectory_extra=_extra(path, "trajectory_extra"),
    )


def _extra(path: str | Path, name: str) -> Table:
    """{} where the claim had no such columns."""
    return read_table(path, name) if name in open_part(path) else {}


def _plan(attrs: Mapping[str, Any], group: Table) -> ClaimPlan | None:
    """None: the part is older than plans."""
    plan = attrs.get("plan")
    if plan is None:
        return None
    return ClaimPlan(steps=group["step"], num_steps=plan["steps"], rule=plan["rule"], seed=plan["seed"])


def _branches(trajectory: Table) -> Branches | None:
    """None: no episode of the part was forked."""
    if "episode" not in trajectory:
        return None
    episodes, parents, fork_offsets = (trajectory[name] for name in ("episode", "parent", "fork_offset"))
    return Branches(episodes=episodes, parents=parents, fork_offsets=fork_offsets)


def _turns(path: str | Path, attrs: Mapping[str, Any]) -> Sequence[TurnRow]:
    """() where nothing was said of a turn."""
    if "turn_rewards" not in attrs:
        return ()
    table, names = read_table(path, "turn"), attrs["turn_rewards"]
    columns = (table[name].tolist() for name in ("trajectory", "offset", "rewards", "key"))
    return [
        (row, offset, {n: v for n, v in zip(names, said, strict=True) if not np.isnan(v)}, str(key) or None)
        for row, offset, said, key in zip(*columns, strict=True)
    ]


def open_part(path: str | Path) -> zarr.Group:
    """Open a part for reading single arrays.

    Raises:
        PmdflowError: as in `read_part`.
    """
    try:
        root = zarr.open_group(str(path), mode="r", zarr_format=3, use_consolidated=False)
    except (OSError, ValueError, KeyError) as error:
        raise PmdflowError(
            f"{path} is not a readable archive part: {error}",
            hint="bring it back from a copy, or move it away: the other parts are read without it",
        ) from error
    if root.attrs.get("format") != FORMAT:
        raise PmdflowError(
            f"{path} has the format {root.attrs.get('format')!r}; this version reads {FORMAT!r}",
            hint="use the pmdflow that wrote it",
        )
    return root


def read_attrs(path: str | Path) -> dict[str, Any]:
    """The attributes of a part: format, model, iteration, version and what `write_part` was given."""
    return dict(open_part(path).attrs)


def read_table(path: str | Path, name: str, columns: Sequence[str] | None = None) -> Table:
    """Read whole columns of the table `token`, `segment`, `trajectory`, `group` or `turn` (None: all of them)."""
    table = cast(zarr.Group, open_part(path)[name])
    wanted = sorted(table.array_keys()) if columns is None else columns
    return {column: np.asarray(cast(Any, table[column])[...]) for column in wanted}
