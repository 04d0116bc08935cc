"""Tokens of the next claim come from the disk while this one is trained."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pmdflow.store import TrajectoryStore
from tests.support.filled_store import PROMPT

LENGTH, ATTEMPTS, GROUPS = 20_000, 4, 3
TIMEOUT_S = 20.0


def pages_in_memory(path: Path) -> int:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        count = -(-len(mapped) // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * count)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), seen) == 0
        return sum(page & 1 for page in seen)


def forget(path: Path) -> None:
    """Drop what the kernel has of a file."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def open_buffer(path: Path) -> TrajectoryStore:
    return TrajectoryStore(
        path, groups_per_iteration=1, lookahead=1, max_staleness=0, file_bytes=4 * LENGTH * ATTEMPTS * 2
    )


def test_the_next_groups_are_read_ahead_and_masked_when_they_are_claimed(tmp_path: Path) -> None:
    completions = np.arange(ATTEMPTS * LENGTH, dtype=np.int32).reshape(ATTEMPTS, LENGTH)
    logprobs = np.zeros((ATTEMPTS, LENGTH), np.float32)
    with open_buffer(tmp_path) as store:
        for _ in range(GROUPS):
            store.put_group(PROMPT, completions, logprobs, [0.0] * ATTEMPTS)
    files = sorted(tmp_path.glob("*.log"))
    for file in files:
        forget(file)
    with open_buffer(tmp_path) as store:
        for file in files:
            forget(file)
        cold = sum(map(pages_in_memory, files))
        group_pages = LENGTH * ATTEMPTS * 8 // mmap.PAGESIZE
        if cold > group_pages / 2:
            pytest.skip("this file system keeps pages that it is asked to forget")
        assert store.prefetch() == ATTEMPTS * (LENGTH + len(PROMPT.tokens))
        deadline = time.monotonic() + TIMEOUT_S
        while sum(map(pages_in_memory, files)) - cold < 0.9 * group_pages:
            assert time.monotonic() < deadline, "one group, and no claim yet"
            time.sleep(0.01)
        assert sum(map(pages_in_memory, files)) - cold < 1.5 * group_pages, "only what the next claim takes"
        store.publish(1)
        assert store.claim(1, 0, timeout_s=0.0).status == "claimed"
        np.testing.assert_array_equal(store.read_claim(1).tokens[3 : 3 + LENGTH], completions[0])


def test_nothing_is_ready_and_in_memory_there_is_nothing_to_read() -> None:
    with TrajectoryStore(None, groups_per_iteration=1, lookahead=0, max_staleness=None) as store:
        assert store.prefetch() == 0
        store.put_group(PROMPT, [[1, 2], [3]], [[0.0, 0.0], [0.0]], [0.0, 1.0])
        assert store.prefetch() == 2 * 3 + 3
