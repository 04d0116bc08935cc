"""`pmdflow store`: the groups that a run's store holds, one in full, and the way past one that cannot be trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pmdflow.errors import PmdflowError
from pmdflow.learner.checkpoint.manifest import newest_manifest
from pmdflow.run.directory import RunDirectory
from pmdflow.run.discards import DiscardRequest
from pmdflow.store import CorruptLog, DiskFault, StoreError, StoreLocked, TrajectoryStore

Action = Literal["list", "show", "discard"]
Row: TypeAlias = dict[str, Any]
"""A group as `TrajectoryStore.groups` tells it."""

_COLUMNS = ("group", "state", "iteration", "members", "scored", "failed", "late", "tokens", "prompt_id")


def stored(run: Path, action: Action, *, group: int | None, reason: str | None) -> int:
    """List groups, show `group`, or discard it for `reason`; returns the exit code.

    Raises:
        PmdflowError: the run has no store or it cannot be opened, the group is not in it, the reason cannot be kept,
            or a claim that a checkpoint covers has the group.
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
    sys.stdout.write(_discard(run, found, DiscardRequest(group=group, reason=reason or "")) + "\n")
    return 0


@contextmanager
def _opened(run: Path, *, write: bool) -> Iterator[TrajectoryStore]:
    """The run's store, closed at the end.

    Raises:
        PmdflowError: in place of whatever the store refuses.
    """
    folder = run / "store"
    try:
        with (
            TrajectoryStore(folder, groups_per_iteration=1, lookahead=0, max_staleness=None)
            if write
            else TrajectoryStore.read(folder)
        ) as store:
            yield store
    except StoreLocked as error:
        raise PmdflowError(str(error), hint="wait until the other program has closed the store") from error
    except CorruptLog as error:
        raise PmdflowError(
            str(error), hint="a store of a newer pmdflow needs that version; bring a damaged one back from a copy"
        ) from error
    except DiskFault as error:
        raise PmdflowError(
            f"its log files fail: {error}", hint="free space on their disk, or bring them back from a copy"
        ) from error
    except (StoreError, ValueError, OverflowError) as error:
        raise PmdflowError(str(error), hint=f"list the groups and their states: pmdflow store {run}") from error


def _groups(run: Path) -> list[Row]:
    with _opened(run, write=False) as store:
        return list(store.groups())


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
    with _opened(run, write=False) as store:
        for found in store.query(group=row["group"]):
            versions = (
                "" if found.first_version is None else f", versions {found.first_version} to {found.last_version}"
            )
            lines.append(
                f"trajectory {found.trajectory}: {found.state}, {found.length} tokens{versions}, "
                f"stop {found.stop.name.lower()}, reward {'-' if found.reward is None else f'{found.reward:g}'}"
            )
    return "\n".join(lines)


def _discard(run: Path, row: Row, request: DiscardRequest) -> str:
    if RunDirectory.is_live(run):
        request.write(run)
        return f"asked the run to discard group {request.group}; its events say when it has"
    with _opened(run, write=True) as store:
        if row["iteration"] is not None:
            _undo_claims(run, store, row["iteration"])
        store.discard(request.group, request.reason)
    return f"discarded group {request.group}"


def _undo_claims(run: Path, store: TrajectoryStore, iteration: int) -> None:
    """Undo what a resume would undo: the claims that no checkpoint covers. They are made again without the group."""
    manifest = newest_manifest(run / "checkpoints")
    covered = 0 if manifest is None else manifest.iteration
    if iteration > covered:
        store.uncommit(covered)
