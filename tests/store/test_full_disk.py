"""A disk without room: what the store refuses, what it still does, and that commit and evict make room again."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmdflow.store import StoreFull, TrajectoryStore
from pmdflow.types import Prompt, Quota
from tests.support.crash_processes import admit, segment
from tests.support.filled_store import PROMPT

TOKENS = 10_000
DEADLINE_S = 30.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def open_store(directory: Path, file_bytes: int, groups_per_iteration: int = 1) -> TrajectoryStore:
    return TrajectoryStore(
        directory / "store",
        groups_per_iteration=groups_per_iteration,
        lookahead=1000,
        max_staleness=None,
        grant_tokens=1 << 20,
        file_bytes=file_bytes,
    )


def quota(store: TrajectoryStore, groups: int) -> None:
    version = store.counts().version
    store.set_quota(Quota(version=version, groups=groups, tokens=1 << 40, tokens_per_segment=None))


def fill(directory: Path) -> None:
    """Take whatever room is left."""
    with open(directory / "others", "ab", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    assert not os.statvfs(directory).f_bfree


def generate(store: TrajectoryStore) -> None:
    version = store.counts().version
    leases = store.lease("w", version, 2, 0.0)
    assert leases
    store.append([segment(lease, 0, TOKENS, stop="stop", version=version) for lease in leases])


def train(store: TrajectoryStore, iteration: int) -> None:
    """An iteration that is trained and not yet committed."""
    admit(store, iteration)
    generate(store)
    for item in store.unscored(2, 60.0, 0.0):
        store.score(item.trajectory, item.attempt, "scored", 1.0)
    assert store.claim(iteration, store.counts().version, 0.0).status == "claimed"
    store.publish(iteration + 1, iteration)
    quota(store, 1000)


def train_until_full(store: TrajectoryStore) -> tuple[int, str]:
    """How many iterations there is room for, and what the next one is told."""
    for iteration in itertools.count():
        try:
            train(store, iteration)
        except StoreFull as refusal:
            return iteration, str(refusal)
    raise AssertionError


def test_a_full_disk_is_emptied_by_commit_and_evict(disk: Path) -> None:
    store = open_store(disk, 1 << 20)
    store.publish(0)
    quota(store, 1000)
    trained, told = train_until_full(store)
    assert trained > 10
    assert re.search(rf"{disk}/store/\S+: the disk is full, \d+ more bytes are needed; commit and evict", told)
    fill(disk)
    quota(store, 1001)  # nothing is poisoned, and what brings no tokens has room
    before = store.ledger()
    store.close()
    fill(disk)

    store = open_store(disk, 1 << 20)
    assert store.ledger() == before
    files = len(list(disk.glob("store/*.log")))
    store.commit(trained - 1)
    assert store.evict(trained - 1) == trained
    assert len(list(disk.glob("store/*.log"))) < files
    admit(store, 2000)
    generate(store)
    store.close()
    assert open_store(disk, 1 << 20).ledger()["generated"] >= before["generated"]


def until_full(call: Callable[[int], None]) -> None:
    with contextlib.suppress(StoreFull):
        for number in itertools.count():
            call(number)


def lease_and_give_back(store: TrajectoryStore) -> None:
    """What workers do that find no room for tokens."""
    version = store.counts().version
    leases = store.lease("w", version, 8, 0.0)
    store.append([segment(lease, len(lease.prefix), 0, stop="abort", version=version) for lease in leases])


def test_leases_and_quotas_leave_the_room_in_which_a_full_disk_is_emptied(disk: Path) -> None:
    store = open_store(disk, 64 << 10)
    store.publish(0)
    quota(store, 1000)
    store.admit("idle", PROMPT, group_size=8, max_tokens=100, priority=-1)
    trained, _ = train_until_full(store)
    fill(disk)
    until_full(lambda number: lease_and_give_back(store))
    until_full(lambda number: quota(store, number))
    store.commit(trained - 1)
    files = len(list(disk.glob("store/*.log")))
    assert store.evict(trained - 1) == trained
    store.discard(0, "nobody begins it")
    assert len(list(disk.glob("store/*.log"))) < files
    quota(store, 1000)
    store.close()


def test_there_is_room_for_the_snapshot_that_an_eviction_needs_of_many_short_groups(disk: Path) -> None:
    (disk / "others").write_bytes(bytes(4 << 20))
    store = open_store(disk, 4096, groups_per_iteration=100)
    until_full(lambda number: put(store, number, members=8, tokens=2))
    fill(disk)
    files = len(list(disk.glob("store/*.log")))
    assert store.claim(1, 0, 0.0).status == "claimed"
    store.publish(1, 1)
    store.commit(1)
    assert store.evict(1) == 100
    assert len(list(disk.glob("store/*.log"))) < files - 10
    store.close()


def put_long_name(store: TrajectoryStore, number: int) -> None:
    prompt = Prompt(id="p" * 2000, text=PROMPT.text, tokens=PROMPT.tokens)
    store.put_group(prompt, [[1]] * 2, [[-1.0]] * 2, [1.0] * 2, request_id=str(number))


def put_many_components(store: TrajectoryStore, number: int) -> None:
    components = {f"component-{name}": name + 0.5 for name in range(200)}
    store.put_group(PROMPT, [[1]] * 2, [[-1.0]] * 2, [1.0] * 2, components=[components] * 2, request_id=str(number))


def put_many_turns(store: TrajectoryStore, number: int) -> None:
    group = store.admit(str(number), PROMPT, group_size=2, max_tokens=100)
    for lease in store.lease_group("w", group):
        for turn in range(30):
            store.turn(lease.trajectory, lease.epoch, turn, {"step": 0.5}, key=f"{turn:040}")
        store.append([segment(lease, 0, 3, stop="stop", version=0)])
        store.score(lease.trajectory, 0, "scored", 1.0)


@pytest.mark.parametrize("put_group", [put_long_name, put_many_components, put_many_turns])
def test_there_is_room_for_the_snapshot_that_an_eviction_needs_however_much_is_said_of_a_group(
    disk: Path, put_group: Callable[[TrajectoryStore, int], None]
) -> None:
    (disk / "others").write_bytes(bytes(3 << 20))
    store = open_store(disk, 16 << 10, groups_per_iteration=20)
    store.publish(0)
    quota(store, 1 << 30)
    until_full(lambda number: put_group(store, number))
    fill(disk)
    files = len(list(disk.glob("store/*.log")))
    assert store.claim(1, 0, 0.0).status == "claimed"
    store.publish(1, 1)
    store.commit(1)
    assert store.evict(1) == 20
    deadline = time.monotonic() + DEADLINE_S  # what `evict` leaves to compaction goes a little later
    while len(list(disk.glob("store/*.log"))) >= files:
        assert time.monotonic() < deadline, "nothing went"
        time.sleep(0.01)
    store.close()


def test_a_snapshot_without_room_is_left_out(disk: Path) -> None:
    file_bytes = 64 << 10
    store = open_store(disk, file_bytes)
    store.publish(0)
    quota(store, 1)
    aside = disk / "store" / "index.tmp"
    aside.unlink()
    fill(disk)
    for groups in range(file_bytes // 64):
        quota(store, groups)
    assert aside.exists(), "a snapshot was begun"
    (disk / "others").unlink()
    admit(store, 0)
    store.close()


def put(store: TrajectoryStore, number: int, members: int = 2, tokens: int = TOKENS) -> None:
    completions, logprobs = [[1] * tokens] * members, [[-1.0] * tokens] * members
    store.put_group(PROMPT, completions, logprobs, [1.0] * members, request_id=str(number))


def test_a_group_that_found_no_room_is_finished_by_its_repeat(disk: Path) -> None:
    with open_store(disk, 1 << 20) as store:
        (disk / "others").write_bytes(bytes(1 << 20))
        number = -1
        with contextlib.suppress(StoreFull):
            for number in itertools.count():
                put(store, number)
        (refused,) = store.groups("partial")
        assert (refused["request_id"], store.counts().trajectories_leased) == (str(number), 0)
        (disk / "others").unlink()
        put(store, number)
        assert store.counts().groups_ready == number + 1
