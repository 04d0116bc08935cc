"""pmdflow's store as a subject of `bench/store.py`, through its public API alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from store_workload import BATCH_GROUPS, GROUP_SIZE, NUM_VERSIONS, Batch, Workload

from pmdflow.store import BatchBuffers, TrajectoryStore
from pmdflow.types import Mask, Prompt, Quota, Segment, TrainBatch

TIMEOUT_S = 60.0


def open_store(directory: Path | None, **settings: Any) -> TrajectoryStore:
    """A store whose limits never bind."""
    defaults: dict[str, Any] = {
        "groups_per_iteration": BATCH_GROUPS,
        "lookahead": 1_000_000,
        "max_staleness": None,
        "lease_ttl_s": 1e6,
    }
    return TrajectoryStore(directory, **defaults | settings)


def publish(store: TrajectoryStore, version: int, iteration: int | None = None) -> None:
    """Publish with a budget without end."""
    store.publish(version, iteration)
    store.set_quota(Quota(version=version, groups=1 << 30, tokens=1 << 40, tokens_per_segment=None))


def publish_all(store: TrajectoryStore) -> None:
    """Versions 0 .. 3, those of the workload."""
    for version in range(NUM_VERSIONS):
        publish(store, version)


def admit(store: TrajectoryStore, groups: Iterable[int], *, size: int = GROUP_SIZE) -> None:
    tokens = np.array([1], dtype=np.int32)
    for group in groups:
        prompt = Prompt(id=f"p{group}", text="", tokens=tokens)
        store.admit(f"g{group}", prompt, group_size=size, max_tokens=8192, cursor=group, wait=False)
    sync(store)


def lease(store: TrajectoryStore, count: int, *, version: int = NUM_VERSIONS - 1) -> npt.NDArray[np.int64]:
    """Trajectory and epoch of `count` leases, in the order of admission [count, 2]."""
    rows: list[tuple[int, int]] = []
    while len(rows) < count:
        leases = store.lease("bench", version, min(4096, count - len(rows)), TIMEOUT_S)
        rows += [(lease.trajectory, lease.epoch) for lease in leases]
    return np.array(sorted(rows), dtype=np.int64)


def sync(store: TrajectoryStore) -> None:
    if not store.wait_durable(store.counts().lsn, TIMEOUT_S):
        raise TimeoutError(f"the store is not durable after {TIMEOUT_S:g} s")


class Segments:
    """The workload as segments of leased trajectories, each complete with one append."""

    def __init__(self, work: Workload, leases: npt.NDArray[np.int64]) -> None:
        self._work = work
        self._rows: list[list[int]] = np.column_stack([leases, work.version_of]).tolist()
        self.first = int(leases[0, 0])

    def __call__(self, members: Sequence[int]) -> list[Segment]:
        work = self._work
        return [
            Segment(
                trajectory=trajectory,
                epoch=epoch,
                offset=0,
                version=version,
                temperature=1.0,
                tokens=work.tokens(member),
                logprobs=work.logprobs(member),
                next_version=NUM_VERSIONS - 1,
                stop="stop",
            )
            for member, (trajectory, epoch, version) in zip(
                members, [self._rows[member] for member in members], strict=True
            )
        ]


class Ours:
    """The store; its groups are admitted and leased before the clock starts, as the peers have no such step."""

    def __init__(self, directory: Path | None, work: Workload, *, wait: bool = True, **settings: Any) -> None:
        self.store = open_store(directory, **settings)
        publish_all(self.store)
        admit(self.store, range(work.num_groups))
        self.segments = Segments(work, lease(self.store, work.size))
        self._work, self._wait = work, wait

    def append(self, members: Sequence[int]) -> None:
        self.store.append(self.segments(members), wait=self._wait)

    def flush(self) -> None:
        sync(self.store)

    def claim_all(self) -> range:
        """Score and claim everything; the iterations, each a batch of 64 groups."""
        for trajectory in range(self.segments.first, self.segments.first + self._work.size):
            self.store.score(trajectory, 0, "scored", 1.0, wait=False)
        iterations = range(self._work.num_groups // BATCH_GROUPS)
        for iteration in iterations:
            answer = self.store.claim(iteration, NUM_VERSIONS - 1 + iteration, TIMEOUT_S)
            assert answer.status == "claimed"
            publish(self.store, NUM_VERSIONS + iteration, iteration)
        return iterations

    def read_claim(self, iteration: int, out: BatchBuffers | None) -> TrainBatch:
        """A batch in reused arrays and unchecked, or in fresh arrays and checked."""
        return self.store.read_claim(iteration, out=out, check=out is None)

    def buffers(self) -> BatchBuffers:
        """Room for any claim, touched."""
        buffers = BatchBuffers.allocate(self._work.out().tokens.size)
        for field in fields(buffers):
            getattr(buffers, field.name).fill(1)
        return buffers

    def as_batch(self, packed: TrainBatch) -> Batch:
        """A claim without its prompts, for the comparison with the truth."""
        generated = (packed.mask & Mask.GENERATED) != 0
        return Batch(
            members=packed.trajectories - self.segments.first,
            tokens=packed.tokens[generated],
            logprobs=packed.logprobs[generated],
            versions=packed.versions[generated],
        )

    def close(self) -> None:
        self.store.close()


class OneByOne(Ours):
    """The same, a call for each trajectory."""

    def append(self, members: Sequence[int]) -> None:
        for segment in self.segments(members):
            self.store.append([segment])
