"""How long does an append wait for what else the store does? A question of `bench/store.py`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import store_peers as peers
from store_ours import admit, lease, open_store, publish_all
from store_paired import Answer, Rounds
from store_speed import Bench
from store_state import short_segments
from store_workload import NUM_VERSIONS

from pmdflow.store import TrajectoryStore, encode_segments
from pmdflow.types import Prompt, Quota, Segment

NUM_GROUPS, MEMBERS = 100_000, 10
CHUNK_GROUPS = 1000
NUM_PARTIAL = 4096
NUM_APPENDS, LANES, TOKENS = 2000, 64, 8
ONE_FILE_BYTES, SMALL_FILE_BYTES = 64 << 20, 1 << 20
"""In small files a rotation comes every 200 appends or so."""


def fill(directory: Path, num_groups: int) -> None:
    """Complete trajectories of one append each, and some that are not begun."""
    store = open_store(peers.fresh(directory), durability="os")
    publish_all(store)
    for first in range(0, num_groups, CHUNK_GROUPS):
        admit(store, range(first, min(first + CHUNK_GROUPS, num_groups)), size=MEMBERS)
        leases = lease(store, (min(first + CHUNK_GROUPS, num_groups) - first) * MEMBERS)
        for start in range(0, len(leases), 256):
            store.append(short_segments(leases[start : start + 256], stop=True), wait=False)
    prompt = Prompt(id="", text="", tokens=np.array([1], dtype=np.int32))
    for number in range(num_groups, num_groups + NUM_PARTIAL // MEMBERS + 1):
        store.admit(f"g{number}", prompt, group_size=MEMBERS, max_tokens=1 << 20, cursor=number, wait=False)
    store.close()


class Appender:
    """Appends of 8 tokens to each of 64 trajectories, durable each time, as a worker sends them."""

    def __init__(self, store: TrajectoryStore) -> None:
        self._store = store
        leases = store.lease("bench", NUM_VERSIONS - 1, NUM_PARTIAL, 60.0)
        assert len(leases) == NUM_PARTIAL
        self._lanes = deque([lease.trajectory, lease.epoch, len(lease.prefix)] for lease in leases)

    def _batch(self) -> bytes:
        tokens, logprobs = np.arange(TOKENS, dtype=np.int32), np.zeros(TOKENS, np.float32)
        lanes = [self._lanes.popleft() for _ in range(LANES)]
        segments = [
            Segment(
                trajectory=trajectory,
                epoch=epoch,
                offset=offset,
                version=NUM_VERSIONS - 1,
                temperature=1.0,
                tokens=tokens,
                logprobs=logprobs,
                next_version=NUM_VERSIONS - 1,
                stop=None,
            )
            for trajectory, epoch, offset in lanes
        ]
        self._lanes.extend([trajectory, epoch, offset + TOKENS] for trajectory, epoch, offset in lanes)
        return encode_segments(segments)

    def latencies_ms(self, count: int, beside: Callable[[], object] | None = None) -> list[float]:
        """Milliseconds of each append while `beside` is called again and again."""
        stopped, called = threading.Event(), threading.Event()

        def repeat() -> None:
            while not stopped.is_set() and beside is not None:
                called.set()
                beside()

        thread = threading.Thread(target=repeat)
        thread.start()
        if beside is not None:
            called.wait()
        seen = []
        for _ in range(count):
            batch = self._batch()
            start = time.perf_counter()
            self._store.append(batch)
            seen.append(1e3 * (time.perf_counter() - start))
        stopped.set()
        thread.join()
        return seen


def quotas(store: TrajectoryStore) -> Callable[[], None]:
    """Another quota of the newest version with each call."""
    number = 0

    def set_one() -> None:
        nonlocal number
        number += 1
        limits = {"groups": 1 << 30, "tokens": 1 << 40, "tokens_per_segment": 1_000_000 + number % 2}
        store.set_quota(Quota(version=NUM_VERSIONS - 1, **limits))
        time.sleep(0.001)

    return set_one


def every_group(store: TrajectoryStore) -> None:
    """Look at all groups."""
    deque(store.groups(), maxlen=0)


def beside(bench: Bench) -> Answer:
    """p99.9 of an append alone, and beside groups(), set_quota and rotations, with a million trajectories."""
    home, rounds, worst = bench.directory / "ours", Rounds("ms"), Rounds("ms")
    count = max(200, round(NUM_APPENDS * min(1.0, bench.scale)))
    fill(home, max(100, round(NUM_GROUPS * bench.scale)))

    def note(name: str, seen: list[float]) -> None:
        rounds.add(f"{name}, p99.9", float(np.percentile(seen, 99.9)))
        worst.add(f"{name}, most", max(seen))

    for _ in range(bench.rounds):
        store = open_store(home, file_bytes=ONE_FILE_BYTES, grant_tokens=1 << 20)
        appender = Appender(store)
        appender.latencies_ms(100)
        note("alone", appender.latencies_ms(count))
        note("groups()", appender.latencies_ms(count, partial(every_group, store)))
        note("set_quota", appender.latencies_ms(count, quotas(store)))
        store.close()
        store = open_store(home, file_bytes=SMALL_FILE_BYTES, grant_tokens=1 << 20)
        appender = Appender(store)
        note("rotation", appender.latencies_ms(count))
        store.close()
    ratios = [
        rounds.ratio(f"{name}, p99.9", "alone, p99.9", 3.0, "at most") for name in ("groups()", "set_quota", "rotation")
    ]
    rounds.numbers |= worst.numbers
    return Answer(
        rounds=rounds, ratios=ratios, notes=(f"{count:,} appends each; `cargo bench --bench beside` has snapshots",)
    )
