"""A reader beside the writer: what it shows, and how it is brought up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.store import StoreError, TrajectoryStore
from tests.support.filled_store import admit, complete, quota, ready_store


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
