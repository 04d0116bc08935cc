"""`pmdflow store`: the groups that a run's store holds, one in full, and the way past one that cannot be trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pmdflow.errors import PmdflowError
from pmdflow.learner.checkpoint.manifest import newest_manifest
from pmdflow.run.directory import RunDirectory
from pmdflow.run.discards import DiscardRequest
from pmdflow.store import Conflict, StoreError, TrajectoryStore

Action = Literal["list", "show", "discard"]
Row: TypeAlias = dict[str, Any]
"""A group as `TrajectoryStore.groups` tells it."""

_COLUMNS = ("group", "state", "iteration", "members", "scored", "failed", "late", "tokens", "prompt_id")


def stored(run: Path, action: Action, *, group: int | None, reason: str | None) -> int:
    """List groups, show `group`, or discard it for `reason`; returns the exit code.

    Raises:
        PmdflowError: the run has no store, the group is not in it, or a claim that a checkpoint covers has it.
    """
    if action != "list" and group is None:
        raise PmdflowError(f"`{action}` needs a group", hint=f"name one: pmdflow store {run} {action} GROUP")
    if not any((run / "store").glob("*.log")):
        raise PmdflowError(f"{run} has no store", hint="name the directory of a run that has begun")
    if group is None:
        sys.stdout.write(_listing(_groups(run)) + "\n")
        return 0
    found = next((row for row in _groups(run) if row["group"] == group), None)
    if found is None:
        raise PmdflowError(
            f"group {group} is not in the store of {run}", hint=f"list those there are: pmdflow store {run}"
        )
    if action == "show":
        sys.stdout.write(_shown(run, found) + "\n")
        return 0
    if not reason or not reason.strip():
        raise PmdflowError("discarding needs a reason", hint='say why for the record: --reason "its answer is wrong"')
    sys.stdout.write(_discard(run, found, DiscardRequest(group=group, reason=reason)) + "\n")
    return 0


def _groups(run: Path) -> list[Row]:
    store = TrajectoryStore.read(run / "store")
    try:
        return store.groups()
    finally:
        store.close()


def _listing(groups: list[Row]) -> str:
    cells = [[_cell(row, name) for name in _COLUMNS] for row in groups]
    widths = [max(len(row[i]) for row in [_COLUMNS, *cells]) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [_COLUMNS, *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(row: Row, name: str) -> str:
    value = len(row["trajectories"]) if name == "members" else row[name]
    return "-" if value is None else str(value)


def _shown(run: Path, row: Row) -> str:
    lines = [f"{name}: {_cell(row, name)}" for name in _COLUMNS]
    lines += [f"prompt: {row['text']!r}", f"metadata: {json.dumps(row['metadata'], default=str, ensure_ascii=False)}"]
    store = TrajectoryStore.read(run / "store")
    try:
        for found in store.query(group=row["group"]):
            versions = (
                "" if found.first_version is None else f", versions {found.first_version} to {found.last_version}"
            )
            lines.append(
                f"trajectory {found.trajectory}: {found.state}, {found.length} tokens{versions}, "
                f"stop {found.stop.name.lower()}, reward {'-' if found.reward is None else f'{found.reward:g}'}"
            )
    finally:
        store.close()
    return "\n".join(lines)


def _discard(run: Path, row: Row, request: DiscardRequest) -> str:
    if RunDirectory.is_live(run):
        request.write(run)
        return f"asked the run to discard group {request.group}; its events say when it has"
    store = TrajectoryStore(run / "store", groups_per_iteration=1, lookahead=0, max_staleness=None)
    try:
        if row["iteration"] is not None:
            _undo_claims(run, store, row["iteration"])
        store.discard(request.group, request.reason)
    except Conflict as error:
        raise PmdflowError(str(error)) from error
    except StoreError as error:
        raise PmdflowError(f"group {request.group} was not discarded: {error}") from error
    finally:
        store.close()
    return f"discarded group {request.group}"


def _undo_claims(run: Path, store: TrajectoryStore, iteration: int) -> None:
    """Undo what a resume would undo: the claims that no checkpoint covers. They are made again without the group."""
    manifest = newest_manifest(run / "checkpoints")
    covered = 0 if manifest is None else manifest.iteration
    if iteration > covered:
        store.uncommit(covered)
