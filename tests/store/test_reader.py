"""A reader beside the writer: what it shows, and how it is brought up to date."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from pmdflow.store import StoreError, TrajectoryStore, encode_segments
from tests.support.filled_store import PROMPT, admit, complete, open_store, quota, ready_store, segment


def test_refresh_shows_what_came_since(tmp_path: Path) -> None:
    with ready_store(tmp_path, file_bytes=4096) as store, TrajectoryStore.read(tmp_path) as reader:
        for number in range(8):
            admit(store, number)
            complete(store, version=number)
            assert store.claim(number, number, 0.0).status == "claimed"
            store.publish(number + 1, number)
            store.set_quota(quota(number + 1))
            store.commit(number)
            assert number not in reader.claims()
            reader.refresh()
            assert reader.read_claim(number).tokens.tolist() == store.read_claim(number).tokens.tolist()
            assert (reader.claims(), reader.ledger()) == (store.claims(), store.ledger())
            store.evict(number)
    with pytest.raises(StoreError, match="closed"):
        reader.counts()


def test_only_a_reader_is_refreshed(tmp_path: Path) -> None:
    with ready_store(tmp_path) as store, pytest.raises(ValueError, match="only a store opened by `read`"):
        store.refresh()


def test_tokens_and_columns_are_read_beside_the_moves_that_empty_their_files(tmp_path: Path) -> None:
    """Few live trajectories lie in files of much that is evicted: they are moved, and their files deleted."""
    kept: list[int] = []
    over = Event()

    def keep(store: TrajectoryStore, number: int) -> None:
        group = store.admit(f"kept-{number}", PROMPT, group_size=1, max_tokens=300, wait=False)
        (lease,) = store.lease_group(f"worker-{number}", group)
        version = store.counts().version
        whole = segment(lease, 300, version=version, stop="stop")
        store.append(encode_segments([whole], extra=[{"id": np.full(300, lease.trajectory)}]), wait=False)
        kept.append(lease.trajectory)

    def read(store: TrajectoryStore) -> int:
        reads = 0
        while not over.is_set():
            ids = list(kept)
            tokens = store.read_tokens(ids).tokens.reshape(len(ids), -1)[:, len(PROMPT.tokens) :]
            assert (tokens == np.arange(300) + 100 * np.array(ids)[:, None]).all()
            starts = np.arange(len(ids)) * 300
            columns = store.read_columns(ids, starts=starts, total=300 * len(ids), names=["id"])
            assert (columns["id"].reshape(len(ids), -1) == np.array(ids)[:, None]).all()
            reads += 1
        return reads

    store = open_store(tmp_path, groups_per_iteration=20, min_group_size=1, file_bytes=32 << 10, durability="os")
    with store, ThreadPoolExecutor(1) as pool:
        try:
            for iteration in range(1, 31):
                for _ in range(20):
                    store.put_group(PROMPT, [range(300)], [[0.0] * 300], [1.0])
                keep(store, iteration)
                if iteration == 1:
                    reads = pool.submit(read, store)
                assert store.claim(iteration, iteration - 1, timeout_s=30.0).status == "claimed"
                store.publish(iteration, iteration)
                store.commit(iteration)
                store.evict(iteration)
        finally:
            over.set()
        assert reads.result() > 1
