"""Programs that use a store in a process of their own, for `test_processes.py`; each prints what it saw as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pmdflow.store import Conflict, StoreError, TrajectoryStore
from pmdflow.types import Lease, Prompt, Quota, Segment, StopReason

TOKENS = 30_000


def open_store(directory: str, durability: Any = "group") -> TrajectoryStore:
    store = TrajectoryStore(
        directory,
        groups_per_iteration=1,
        lookahead=9,
        max_staleness=None,
        grant_tokens=1 << 20,
        durability=durability,
        file_bytes=64 << 10,
    )
    if store.counts().version < 0:
        store.publish(0)
        store.set_quota(Quota(version=0, groups=100, tokens=1 << 40, tokens_per_segment=None))
    return store


def admit(store: TrajectoryStore, number: int) -> int:
    prompt = Prompt(id=f"p{number}", text="", tokens=np.array([number + 1], dtype=np.int32))
    return store.admit(f"r{number}", prompt, group_size=2, max_tokens=1 << 20, cursor=number)


def segment(lease: Lease, offset: int, count: int, *, stop: StopReason | None = None, version: int = 0) -> Segment:
    return Segment(
        trajectory=lease.trajectory,
        epoch=lease.epoch,
        offset=offset,
        version=version,
        temperature=1.0,
        tokens=np.arange(offset, offset + count, dtype=np.int32),
        logprobs=-np.ones(count, dtype=np.float32),
        next_version=version,
        stop=stop,
    )


def refusals(store: TrajectoryStore, lease: Lease) -> list[str]:
    """What a child is told when it uses its parent's store."""
    calls: list[Callable[[], Any]] = [
        lambda: admit(store, 7),
        lambda: store.append([segment(lease, 100, 100)]),
        lambda: store.publish(5),
        lambda: store.commit(0),
        lambda: store.evict(0),
        lambda: store.wait_durable(1, 0.0),
        lambda: store.lease("child", 0, 1, 0.0),
        lambda: store.counts(),
    ]
    told = []
    for call in calls:
        try:
            call()
        except Conflict as error:
            told.append(str(error))
    assert len(told) == len(calls)
    store.close()
    return told


def fork(directory: str, durability: str) -> None:
    """A child uses its parent's store and ends; another one lives on when the parent has closed it."""
    store = open_store(directory, durability)
    admit(store, 0)
    lease = store.lease("parent", 0, 1, 0.0)[0]
    store.append([segment(lease, 0, 100)])
    (read, write), (wait, end) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(refusals(store, lease)).encode())
        sys.exit()  # and drops the store
    os.wait()
    told = json.loads(os.read(read, 1 << 16))
    store.append([segment(lease, 100, 100)])
    if os.fork() == 0:
        os.close(end)
        os.read(wait, 1)
        sys.exit()
    store.append([segment(lease, 200, 100)])
    store.close()
    store = open_store(directory, durability)
    tokens = store.trajectory(lease.trajectory)["tokens"].tolist()
    store.close()
    os.close(end)
    _, status = os.wait()
    print(json.dumps({"told": told, "tokens": tokens, "status": status}))


def cut(directory: str) -> None:
    """The files of an open store are cut; then the store and a reader of it read on."""
    store = open_store(directory)
    admit(store, 0)
    lease = store.lease("w", 0, 1, 0.0)[0]
    store.append([segment(lease, 0, TOKENS)])
    told, readers = [], [store, TrajectoryStore.read(directory)]
    for reader in readers:
        assert len(reader.trajectory(lease.trajectory)["tokens"]) == TOKENS
    for path in Path(directory).glob("*.log"):
        os.truncate(path, 8192)
    for reader in readers:
        try:
            reader.trajectory(lease.trajectory)
        except StoreError as error:
            told.append(str(error))
    print(json.dumps(told))


def unreadable(directory: str) -> None:
    """Read when told to, after which the disk may do what it likes."""
    store = open_store(directory)
    admit(store, 0)
    lease = store.lease("w", 0, 1, 0.0)[0]
    store.append([segment(lease, 0, TOKENS)])
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        store.trajectory(lease.trajectory)
    except StoreError as error:
        print(json.dumps(str(error)))


def grow(directory: str, durability: str = "group") -> None:
    """Begin some files."""
    store = open_store(directory, durability)
    admit(store, 0)
    lease = store.lease("w", 0, 1, 0.0)[0]
    for number in range(4):
        store.append([segment(lease, number * TOKENS, TOKENS)])
    store.close()
    store = open_store(directory, durability)
    print(json.dumps([len(store.trajectory(lease.trajectory)["tokens"]), len(list(Path(directory).glob("*.log")))]))


if __name__ == "__main__":
    {"fork": fork, "cut": cut, "unreadable": unreadable, "grow": grow}[sys.argv[1]](*sys.argv[2:])
