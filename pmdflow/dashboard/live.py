"""Trajectories that only the store has, as it is now: read from its files beside the run that writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pmdflow.dashboard.trajectories import STOP_NAMES, Detail, Row, make_token, texts, version_counts
from pmdflow.store import Conflict, TrajectoryStore
from pmdflow.store.answers import StoredTrajectory
from pmdflow.store.archive import part_iteration, parts
from pmdflow.types import Mask


def live_rows(run_dir: Path) -> list[Row]:
    """The trajectories for training that are in the store and not in the archive.

    Raises:
        StoreError: the store cannot be read.
    """
    archived = {part_iteration(path) for path in parts(run_dir)}
    with _opened(run_dir) as store:
        if store is None:
            return []
        return [_row(found) for found in store.query(kind="train") if found.iteration not in archived]


def live_detail(run_dir: Path, trajectory: int, tokenizer: Tokenizer | None) -> Detail | None:
    """One trajectory of the store; None if it is not there.

    Raises:
        StoreError: the store cannot be read.
    """
    with _opened(run_dir) as store:
        if store is None:
            return None
        try:
            found = store.trajectory(trajectory)
        except (Conflict, OverflowError):  # not there, or a number that no trajectory can have
            return None
        siblings = [_row(other) for other in store.query(group=found["group"])]
    num_prompt = len(found["prompt"])
    segments = found["segments"]
    ids = np.concatenate([found["prompt"], found["tokens"]])
    generated = np.concatenate([np.zeros(num_prompt, bool), found["observed"] == 0])
    lengths = np.array([num_prompt, *(length for length, _, _, _ in segments)])
    versions = np.where(generated, np.repeat([-1, *(version for _, version, _, _ in segments)], lengths), -1)
    logprobs = np.concatenate([np.zeros(num_prompt, np.float32), found["logprobs"]])
    mask = np.where(generated, Mask.GENERATED, 0).astype(np.uint8)
    starts = np.zeros(len(ids) + 1, bool)
    starts[np.cumsum(lengths)] = True
    in_prompt = np.arange(len(ids)) < num_prompt
    columns = zip(texts(ids.tolist(), tokenizer), ids, logprobs, mask, versions, starts[:-1], in_prompt, strict=True)
    return Detail(
        row=next(row for row in siblings if row.trajectory == trajectory),
        claim_version=None,
        components=dict(found["components"]),
        temperature=float(segments[-1][2]) if segments else 1.0,
        tokens=[make_token(*column, live=True) for column in columns],
        versions=[(version, tokens, tokens) for version, tokens, _ in version_counts(versions, mask)],
        siblings=siblings,
        branches=_branches(trajectory, found["forks"]),
    )


def _branches(first: int, forks: list[tuple[int, int, int]]) -> list[tuple[int, int | None, int]]:
    """Each is forked from the one before it."""
    ids = [first, *(branch for branch, _, _ in forks)]
    parents, kept = [None, *ids[:-1]], [0, *(offset for _, _, offset in forks)]
    return list(zip(ids, parents, kept, strict=True))


@contextmanager
def _opened(run_dir: Path) -> Iterator[TrajectoryStore | None]:
    """The run's store to read from; None where there is none: the run has just begun, or was copied without."""
    if not any((run_dir / "store").glob("*.log")):
        yield None
        return
    with TrajectoryStore.read(run_dir / "store") as store:
        yield store


def _row(found: StoredTrajectory) -> Row:
    first, last = (-1 if version is None else version for version in (found.first_version, found.last_version))
    unfinished = found.state in ("leased", "idle")  # leases are not on disk
    own = "generating" if unfinished else found.state
    return Row(
        iteration=found.iteration,
        trajectory=found.trajectory,
        group=found.group,
        prompt_id=found.prompt_id,
        reward=found.reward,
        length=found.length,
        first_version=first,
        last_version=last,
        versions=len({first, last} - {-1}),
        stop=STOP_NAMES[found.stop],
        state=own if found.group_state == "partial" else found.group_state,
    )
