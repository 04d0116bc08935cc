"""Trajectories and groups of a run as values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from pmdflow.store.answers import TrajectoryState
from pmdflow.store.archive import part_iteration, parts, read_part
from pmdflow.store.facade import TrajectoryStore
from pmdflow.types import Float32, Float64, Int32, Mask, Stop, TrainBatch, UInt8


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One attempt at a prompt. Shapes: P prompt tokens, S tokens after them.

    Example:
        >>> [t.reward for t in run.trajectories(1)][:3]      # doctest: +SKIP
        [1.0, 0.0, 1.0]
    """

    id: int
    episode: int
    """Its own id; of a branch that was forked from another that of the episode's first branch."""
    group: int
    prompt_id: str
    iteration: int | None
    """The iteration that claimed it; None while none has."""
    state: TrajectoryState | Literal["archived"]
    """`archived` once it is trained and a checkpoint covers it; until then what the store says, to which one that is
    being generated is `idle`: leases are not on disk."""
    prompt: Int32
    """Token ids, [P]."""
    tokens: Int32
    """Token ids, [S]."""
    logprobs: Float32
    """Log-probs of logits / temperature at generation, [S]; 0 where the environment wrote."""
    versions: Int32
    """Policy version that generated each token, [S]; -1 where the environment wrote."""
    mask: UInt8 | None
    """`pmdflow.types.Mask` flags, [S]: what had a gradient, or why not; None before the claim is archived."""
    reward: float | None
    """None without one."""
    components: Mapping[str, float]
    """Parts of the reward by name."""
    stop: Stop
    """Why it ended; `Stop.NONE` while it has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The attempts at one prompt that share a baseline."""

    id: int
    prompt_id: str
    iteration: int | None
    """As of its trajectories."""
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> Float64:
        """Rewards of the episodes that have one, [N]."""
        first = [trajectory for trajectory in self.trajectories if trajectory.id == trajectory.episode]
        return np.array([trajectory.reward for trajectory in first if trajectory.reward is not None], np.float64)


def archived(run: Path, iteration: int | None) -> Iterator[Trajectory]:
    """The trajectories of the archive, part by part, or of one iteration."""
    for path in parts(run):
        if iteration is None or part_iteration(path) == iteration:
            yield from _of_batch(read_part(path))


def stored(run: Path, iteration: int | None) -> Iterator[Trajectory]:
    """The training trajectories that only the store has, as it is now, by group: also beside a run that writes it."""
    if not any((run / "store").glob("*.log")):
        return  # it has just begun, or was copied without
    trained = {part_iteration(path) for path in parts(run)}
    store = TrajectoryStore.read(run / "store")
    try:
        for row in sorted(store.query(kind="train", iteration=iteration), key=lambda row: (row.group, row.trajectory)):
            if row.iteration not in trained:
                yield _of_store(store, row.trajectory, iteration=row.iteration, prompt_id=row.prompt_id)
    finally:
        store.close()


def grouped(trajectories: Iterable[Trajectory]) -> Iterator[Group]:
    """Groups of adjacent trajectories."""
    for group, members in groupby(trajectories, key=lambda trajectory: trajectory.group):
        found = tuple(members)
        first = found[0]
        yield Group(id=group, prompt_id=first.prompt_id, iteration=first.iteration, trajectories=found)


def _of_batch(batch: TrainBatch) -> Iterator[Trajectory]:
    for index, (low, high) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        start = low + batch.prompt_lengths[index]
        yield Trajectory(
            id=int(batch.trajectories[index]),
            episode=int(batch.trajectories[index] if batch.branches is None else batch.branches.episodes[index]),
            group=int(batch.groups[index]),
            prompt_id=batch.prompt_ids[index],
            iteration=batch.iteration,
            state="archived",
            prompt=batch.tokens[low:start],
            tokens=batch.tokens[start:high],
            logprobs=batch.logprobs[start:high],
            versions=np.where(batch.mask[start:high] & Mask.GENERATED, batch.versions[start:high], -1),
            mask=batch.mask[start:high],
            reward=float(batch.rewards[index]),
            components={name: float(v[index]) for name, v in batch.components.items() if not np.isnan(v[index])},
            stop=Stop(int(batch.stops[index])),
        )


def _of_store(store: TrajectoryStore, number: int, *, iteration: int | None, prompt_id: str) -> Trajectory:
    row = store.trajectory(number)
    lengths = [length for length, _, _, _ in row["segments"]]
    versions = np.repeat(np.array([version for _, version, _, _ in row["segments"]], np.int32), lengths)
    generated = row["observed"] == 0
    return Trajectory(
        id=number,
        episode=number,
        group=row["group"],
        prompt_id=prompt_id,
        iteration=iteration,
        state=row["state"],
        prompt=row["prompt"],
        tokens=row["tokens"],
        logprobs=np.where(generated, row["logprobs"], np.float32(0)),
        versions=np.where(generated, versions, np.int32(-1)),
        mask=None,
        reward=row["reward"],
        components=row["components"],
        stop=row["stop"],
    )
