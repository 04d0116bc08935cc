"""Full disks, refused directories and damaged files, through the store's public API on real files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmdflow.store import CorruptLog, DiskFault, StoreError, StorePoisoned, TrajectoryStore
from pmdflow.types import Lease, Prompt, Quota, Segment, StopReason

FILE_BYTES = 4096
NOBODY = 65534
FLIPS = 10_000


def open_store(directory: Path, **settings: Any) -> TrajectoryStore:
    defaults: dict[str, Any] = {"groups_per_iteration": 1, "lookahead": 9, "max_staleness": None}
    return TrajectoryStore(directory, **defaults | {"file_bytes": FILE_BYTES} | settings)


def quota(version: int) -> Quota:
    return Quota(version=version, groups=1000, tokens=1 << 30, tokens_per_segment=None)


def admit(store: TrajectoryStore, number: int) -> int:
    prompt = Prompt(id=f"p{number}", text="", tokens=np.array([number + 1], dtype=np.int32))
    return store.admit(f"r{number}", prompt, group_size=2, max_tokens=1 << 20, cursor=number)


def tokens_of(trajectory: int, count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.arange(count, dtype=np.int32) * 7919 + 1_000_003 * (trajectory + 1)


def segment(lease: Lease, count: int, *, stop: StopReason | None = "stop") -> Segment:
    tokens = tokens_of(lease.trajectory, len(lease.prefix) + count)[len(lease.prefix) :]
    return Segment(
        trajectory=lease.trajectory,
        epoch=lease.epoch,
        offset=len(lease.prefix),
        version=0,
        temperature=1.0,
        tokens=tokens,
        logprobs=-tokens.astype(np.float32),
        next_version=0,
        stop=stop,
    )


Picture = tuple[Any, ...]


def picture(store: TrajectoryStore) -> Picture:
    """All that the store holds but the number of leases given out, every array read and its checksum tested."""
    groups = list(store.groups())
    rows = [store.trajectory(t) for group in groups for t in group["trajectories"]]
    arrays = [tuple(row[name].tobytes() for name in ("prompt", "tokens", "logprobs")) for row in rows]
    plain = [{k: v for k, v in row.items() if k != "epoch" and not isinstance(v, np.ndarray)} for row in rows]
    claims = sorted({group["iteration"] for group in groups} - {None})
    batches = [store.read_claim(iteration).tokens.tobytes() for iteration in claims]
    ledger = {name: count for name, count in store.ledger().items() if name != "reprefill"}
    return groups, plain, arrays, batches, ledger


def life(store: TrajectoryStore, after_each: Callable[[], None] = lambda: None) -> None:
    """A short history with every kind of record, over several files; leases are all given back at its calls' ends."""
    store.publish(0)
    after_each()
    store.set_quota(quota(0))
    after_each()
    for number in range(6):
        admit(store, number)
        after_each()
        first, second = store.lease("w", 0, 2, 0.0)
        store.append([segment(first, 20, stop="budget"), segment(second, 9)])
        after_each()
        (first,) = store.lease("w", 0, 1, 0.0)
        store.append([segment(first, 60)])
        after_each()
        for item in store.unscored(2, 60.0, 0.0):
            store.score(item.trajectory, item.attempt, "scored", item.trajectory / 7, {"right": 1.0})
            after_each()
    for iteration in range(3):
        assert store.claim(iteration, iteration, 0.0).status == "claimed"
        after_each()
        store.publish(iteration + 1, iteration)
        after_each()
        store.commit(iteration)
        after_each()
    store.evict(0)
    after_each()


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of a store directory, to be written out again damaged."""

    contents: dict[str, bytes]

    @classmethod
    def of(cls, directory: Path) -> Files:
        """As they are at one time, beside a store that may delete what it has copied forward."""
        while True:
            names = sorted(directory.iterdir())
            with suppress(FileNotFoundError):
                contents = {path.name: path.read_bytes() for path in names}
                if sorted(directory.iterdir()) == names:
                    return cls(contents=contents)

    def write(self, directory: Path, **damaged: bytes) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for name, content in (self.contents | damaged).items():
            (directory / name).write_bytes(content)

    @property
    def newest_log(self) -> str:
        return max(name for name in self.contents if name.endswith(".log"))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory in memory where there is one: the tests of damaged bytes open thousands of stores."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@contextmanager
def limited_file_size() -> Iterator[Callable[[], None]]:
    """No file may grow beyond 256 KiB, as anybody can arrange; the call lifts that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_directory_without_a_store_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DiskFault, match=f"{tmp_path}: there is no store; name the directory of one"):
        TrajectoryStore.read(tmp_path)


def test_a_failed_allocation_stops_the_store_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    with limited_file_size() as lift:
        store = open_store(directory / "store", file_bytes=64 << 10)
        store.publish(0)
        store.set_quota(quota(0))
        for number in range(20):
            admit(store, number)
        acknowledged: dict[int, int] = {}
        leases = store.lease("w", 0, 40, 0.0)

        def fill() -> None:
            for number, lease in enumerate(leases):
                count = 1000 if number < 20 else 40_000  # the last are larger than any file may become
                store.append([segment(lease, count)])
                acknowledged[lease.trajectory] = count

        with pytest.raises(DiskFault, match=str(directory)):
            fill()
        assert acknowledged
        durable = store.counts().durable_lsn
        with pytest.raises(StorePoisoned, match="after a failure"):
            admit(store, 100)
        with pytest.raises(StorePoisoned, match="after a failure"):
            store.append([segment(leases[-1], 1)])
        assert store.counts().durable_lsn == durable
        with suppress(StoreError):
            store.close()
        lift()
        store = open_store(directory / "store")
        for lease in leases:
            tokens = store.trajectory(lease.trajectory)["tokens"].tolist()
            count = acknowledged.get(lease.trajectory, 0)
            assert tokens == tokens_of(lease.trajectory, count).tolist()
        admit(store, 100)
        store.close()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root ignores permissions; nobody does not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_directory_is_refused_and_still_readable() -> None:
    with tempfile.TemporaryDirectory() as top:
        directory = Path(top) / "store"
        store = open_store(directory)
        life(store)
        wanted = picture(store)
        store.close()
        for path in directory.iterdir():
            path.chmod(0o444)
        directory.chmod(0o555)
        Path(top).chmod(0o755)
        before = Files.of(directory)
        with as_nobody():
            with pytest.raises(DiskFault, match=f"{directory}.*[Pp]ermission denied"):
                open_store(directory)
            with pytest.raises(DiskFault, match=f"{directory}.*[Pp]ermission denied"):
                open_store(directory / "new")
            reader = TrajectoryStore.read(directory)
            assert picture(reader) == wanted
            with pytest.raises(StoreError, match="reading only"):
                reader.set_quota(quota(9))
        assert Files.of(directory) == before
        directory.chmod(0o755)


def test_another_process_reads_beside_the_writer_and_cannot_write(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    life(store)
    program = """
import sys
from pmdflow.store import StoreLocked, TrajectoryStore
reader = TrajectoryStore.read(sys.argv[1])
print(reader.ledger()["generated"], len(list(reader.groups())), reader.counts().lsn)
try:
    TrajectoryStore(sys.argv[1], groups_per_iteration=1, lookahead=1, max_staleness=None)
except StoreLocked as error:
    print(error)
"""
    seen = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    numbers, refusal = seen.stdout.splitlines()
    assert numbers == f"{store.ledger()['generated']} {len(list(store.groups()))} {store.counts().lsn}"
    assert "open in another writer" in refusal
    store.close()


def test_a_log_cut_at_any_byte_opens_as_after_some_call_or_is_refused(scratch: Path) -> None:
    home, copy = scratch / "store", scratch / "copy"
    store = open_store(home)
    pictures: list[Picture] = []
    life(store, lambda: pictures.append(picture(store)))
    files = Files.of(home)  # as a kill would leave them: the log has a tail that nothing calls durable yet
    store.close()
    name, opened = files.newest_log, 0
    for end in range(len(files.contents[name])):
        files.write(copy, **{name: files.contents[name][:end]})
        seen = picture_or_refusal(copy)
        assert seen is None or seen in pictures, f"cut at {end}"
        opened += seen is not None
    assert opened


def picture_or_refusal(directory: Path) -> Picture | None:
    """What an opened store holds; None when it is refused as damaged, which names the place."""
    try:
        store = open_store(directory)
        seen = picture(store)
        store.close()
        return seen
    except CorruptLog as error:
        refusal = str(error)
    assert re.search(rf"{directory}/\S+ is damaged at byte \d+", refusal)
    return None


def flip(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def test_a_flipped_bit_is_refused_or_does_no_harm(scratch: Path) -> None:
    home, copy = scratch / "store", scratch / "copy"
    store = open_store(home)
    life(store)
    wanted = picture(store)
    store.close()
    files, random, refused = Files.of(home), np.random.default_rng(0), 0
    names = [name for name, content in files.contents.items() if content and name != "index.tmp"]  # room, unread
    sizes = np.array([len(files.contents[name]) for name in names])
    for _ in range(FLIPS):
        name = names[int(random.choice(len(names), p=sizes / sizes.sum()))]
        bit = int(random.integers(8 * len(files.contents[name])))
        files.write(copy, **{name: flip(files.contents[name], bit)})
        seen = picture_or_refusal(copy)
        assert seen is None or seen == wanted, f"bit {bit} of {name}"
        refused += seen is None
    assert refused > FLIPS / 3


def test_damaged_tokens_are_reported_with_file_and_offset(tmp_path: Path) -> None:
    store = open_store(tmp_path, file_bytes=1 << 20)
    life(store)
    (victim,) = (row["trajectories"][0] for row in store.groups() if row["iteration"] == 1)
    store.close()
    (file,) = tmp_path.glob("*.log")
    place = file.read_bytes().index(tokens_of(victim, 9)[:8].tobytes())
    file.write_bytes(flip(file.read_bytes(), 8 * place + 3))
    with pytest.raises(CorruptLog, match=rf"{file} is damaged at byte \d+"):
        open_store(tmp_path).read_claim(1)
