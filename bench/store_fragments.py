"""What do appends of a few tokens cost, and what is left of that cost later? Questions of `bench/store.py`."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import store_peers as peers
from store_ours import admit, lease, open_store, publish_all
from store_paired import Answer, Rounds, at_most
from store_speed import Bench
from store_state import anonymous_bytes, crashed_copy, written_bytes
from store_workload import NUM_VERSIONS

from pmdflow.store import BatchBuffers, TrajectoryStore
from pmdflow.types import Segment

NUM_LONG, LONG_TOKENS, APPENDED = 128, 8192, 8
NUM_SHORT, SHORT_TOKENS = 16_384, 64
FILE_BYTES = 256 << 10
"""Small beside the payload, as the files of a run are: that with the admissions stays, and the one being written."""
QUIET_S = 0.3
NUM_READS = 41


def append_all(store: TrajectoryStore, leases: list[tuple[int, int]], offset: int, count: int, stop: bool) -> None:
    """One append of `count` tokens to each trajectory."""
    tokens = (np.arange(offset, offset + count) % 32_000).astype(np.int32)
    logprobs = -(tokens % 1021).astype(np.float32) / 64
    for first in range(0, len(leases), NUM_LONG):
        segments = [
            Segment(
                trajectory=trajectory,
                epoch=epoch,
                offset=offset,
                version=0,
                temperature=1.0,
                tokens=tokens,
                logprobs=logprobs,
                next_version=NUM_VERSIONS - 1,
                stop="stop" if stop else None,
            )
            for trajectory, epoch in leases[first : first + NUM_LONG]
        ]
        store.append(segments, wait=False)


def wait_quiet(store: TrajectoryStore) -> None:
    """Until nothing is written any more: what the store does beside its callers is done."""
    lsn, since = store.counts().lsn, time.perf_counter()
    while time.perf_counter() - since < QUIET_S:
        time.sleep(QUIET_S / 10)
        if store.counts().lsn != lsn:
            lsn, since = store.counts().lsn, time.perf_counter()
    store.sync()


class Filled:
    """A store of trajectories of one length, complete, each in appends of `appended` tokens."""

    def __init__(self, directory: Path, *, trajectories: int, tokens: int, appended: int) -> None:
        self.directory = peers.fresh(directory)
        store = open_store(directory, groups_per_iteration=trajectories // 8, file_bytes=FILE_BYTES)
        publish_all(store)
        admit(store, range(trajectories // 8))
        rows = lease(store, trajectories).tolist()
        before, total = written_bytes(), trajectories * tokens
        for offset in range(0, tokens - appended, appended):
            append_all(store, rows, offset, appended, stop=False)
        store.sync()
        self.partial = store.counts().bytes / max(total - trajectories * appended, 1)
        append_all(store, rows, tokens - appended, appended, stop=True)
        wait_quiet(store)
        self.written = (written_bytes() - before) / total
        self.live = store.counts().bytes / total
        self.store, self.trajectories = store, trajectories

    def claim(self) -> None:
        """Claim all of them."""
        for row in self.store.groups():
            for trajectory in row["trajectories"]:
                self.store.score(trajectory, 0, "scored", 1.0, wait=False)
        assert self.store.claim(1, NUM_VERSIONS - 1, 60.0).status == "claimed"

    def read_ms(self, buffers: BatchBuffers) -> float:
        """Read the claim once."""
        start = time.perf_counter()
        self.store.read_claim(1, out=buffers)
        return 1e3 * (time.perf_counter() - start)

    def opening_ms(self, copy: Path) -> float:
        """Open a copy as after a crash."""
        crashed_copy(self.directory, copy)
        start = time.perf_counter()
        store = open_store(copy, groups_per_iteration=self.trajectories // 8, file_bytes=FILE_BYTES)
        seconds = time.perf_counter() - start
        store.close()
        return 1e3 * seconds


def fragments(bench: Bench) -> Answer:
    """128 trajectories of 8,192 tokens in appends of 8, and in one append each."""
    rounds = Rounds("(unit in the name)")
    buffers = BatchBuffers.allocate(NUM_LONG * (LONG_TOKENS + 1))
    for _ in range(bench.rounds):
        stores = {
            name: Filled(bench.directory / name, trajectories=NUM_LONG, tokens=LONG_TOKENS, appended=appended)
            for name, appended in (("8", APPENDED), ("whole", LONG_TOKENS))
        }
        rounds.add("B a token before completion", stores["8"].partial)
        rounds.add("B a token in all, snapshots too", stores["8"].written)
        rounds.add("B a token that stay", stores["8"].live)
        for name, filled in stores.items():
            rounds.add(f"{name}: open, ms", filled.opening_ms(bench.directory / "copy"))
            filled.claim()
        seen: dict[str, list[float]] = {name: [] for name in stores}
        for name in [*stores] * NUM_READS:
            seen[name].append(stores[name].read_ms(buffers))
        for name, numbers in seen.items():
            rounds.add(f"{name}: read_claim, ms, best of {NUM_READS}", min(numbers))
        for filled in stores.values():
            filled.store.close()
    # A process each: what one has freed would be the other's growth.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        pool.submit(fill_short, bench.directory / "short").result()
        index = pool.submit(index_bytes, bench.directory / "short").result()
    return Answer(
        rounds=rounds,
        ratios=[
            at_most("B a token before completion", 8.9, *rounds.numbers["B a token before completion"]),
            at_most("B a token in all", 17.5, *rounds.numbers["B a token in all, snapshots too"]),
            at_most("B a token that stay", 8.5, *rounds.numbers["B a token that stay"]),
            at_most("index, B of memory a complete trajectory", 512, index),
            rounds.ratio(*(f"{name}: read_claim, ms, best of {NUM_READS}" for name in ("8", "whole")), 1.3, "at most"),
            rounds.ratio("8: open, ms", "whole: open, ms", 2.0, "at most"),
        ],
        notes=(f"files of {FILE_BYTES >> 10} KiB; the index is that of {NUM_SHORT:,} trajectories, opened anew",),
    )


def fill_short(directory: Path) -> None:
    """A store of many short trajectories."""
    Filled(directory, trajectories=NUM_SHORT, tokens=SHORT_TOKENS, appended=APPENDED).store.close()


def index_bytes(directory: Path) -> float:
    """Memory of a store of many short trajectories that is opened, for each of them."""
    empty = open_store(peers.fresh(directory.with_name("empty")))
    before = anonymous_bytes()
    store = TrajectoryStore(directory, groups_per_iteration=1, lookahead=1, max_staleness=None)
    ctypes.CDLL(None).malloc_trim(0)  # what only opening needed
    grown = anonymous_bytes() - before
    empty.close()
    store.close()
    return grown / NUM_SHORT
