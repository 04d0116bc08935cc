"""A trajectory store in memory or in a directory, and the steps from admission to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pmdflow.store import TrajectoryStore
from pmdflow.types import Lease, Prompt, Quota, Segment, StopReason

PROMPT = Prompt(id="p", text="1+1=", tokens=np.array([5, 6, 7], dtype=np.int32), metadata={"answer": "2"})


def open_store(path: Path | None = None, **settings: Any) -> TrajectoryStore:
    defaults: dict[str, Any] = {"groups_per_iteration": 1, "lookahead": 1, "max_staleness": 4}
    return TrajectoryStore(path, **defaults | settings)


def quota(version: int = 0, *, groups: int = 8, tokens: int = 1000, tokens_per_segment: int | None = None) -> Quota:
    return Quota(version=version, groups=groups, tokens=tokens, tokens_per_segment=tokens_per_segment)


def ready_store(path: Path | None = None, **settings: Any) -> TrajectoryStore:
    """A store at version 0 with a budget."""
    store = open_store(path, **settings)
    store.publish(0)
    store.set_quota(quota())
    return store


def admit(store: TrajectoryStore, number: int = 0, *, size: int = 2, max_tokens: int = 20) -> int:
    return store.admit(f"train-{number}", PROMPT, cursor=number, group_size=size, max_tokens=max_tokens)


def segment(
    lease: Lease,
    count: int,
    *,
    offset: int = 0,
    version: int = 0,
    stop: StopReason | None = None,
    next_version: int | None = None,
) -> Segment:
    tokens = np.arange(offset, offset + count, dtype=np.int32) + 100 * lease.trajectory
    return Segment(
        trajectory=lease.trajectory,
        epoch=lease.epoch,
        offset=offset,
        version=version,
        temperature=1.0,
        tokens=tokens,
        logprobs=-tokens.astype(np.float32) / 8,
        next_version=version if next_version is None else next_version,
        stop=stop,
    )


def lease_all(store: TrajectoryStore, *, version: int = 0, now_s: float | None = None) -> list[Lease]:
    return store.lease("worker", version, 100, 0.0, now_s=now_s)


def score_all(store: TrajectoryStore) -> None:
    for item in store.unscored(100, 60.0, 0.0):
        store.score(item.trajectory, item.attempt, "scored", float(item.trajectory), {"right": 1.0})


def complete(store: TrajectoryStore, *, count: int = 4, version: int = 0) -> None:
    """Generate every leasable trajectory to its end and score it."""
    for lease in lease_all(store, version=version):
        store.append([segment(lease, count, offset=len(lease.prefix), version=version, stop="stop")])
    score_all(store)


def assert_exact(store: TrajectoryStore) -> dict[str, int]:
    ledger = store.ledger()
    outside = {"generated", "prompt", "observed", "reprefill", "eval", "overdraft"}
    places = {key: value for key, value in ledger.items() if key not in outside}
    assert sum(places.values()) == ledger["generated"]
    assert min(ledger.values()) >= 0
    return ledger


def snapshot(store: TrajectoryStore) -> tuple[Any, ...]:
    counts = store.counts()
    return counts.lsn, store.ledger(), list(store.groups())
