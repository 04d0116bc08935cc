"""The peers of `bench/store.py`, each as its own users would write it: 64 trajectories a transaction."""

from __future__ import annotations

import ctypes
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from store_workload import BATCH, BYTES_PER_TOKEN, Batch, Out, Workload, members_of

LMDB_MAP_BYTES = 16 << 30


class Subject(Protocol):
    """One store under measurement, opened in an empty directory."""

    def append(self, members: Sequence[int]) -> None:
        """Store trajectories; returns when they are as durable as the subject promises."""

    def flush(self) -> None:
        """End the appends: whatever was promised for later is done."""

    def close(self) -> None:
        """Let go of the directory."""


class Readable(Subject, Protocol):
    """One that gives back what it was given, by group."""

    def read(self, groups: Sequence[int], out: Out | None) -> Batch:
        """Complete groups, packed into `out` or into new arrays."""


def row_of(work: Workload, member: int) -> bytes:
    """One trajectory as the value of a key-value store."""
    return b"".join((work.tokens(member).data, work.logprobs(member).data, work.versions(member).data))


def key_of(member: int) -> bytes:
    return member.to_bytes(8, "big")


def pack(members: np.ndarray[Any, np.dtype[np.int64]], rows: Sequence[Any], out: Out | None) -> Batch:
    """Rows of `row_of` as one batch."""
    counts = [len(row) // BYTES_PER_TOKEN for row in rows]
    total = sum(counts)
    pieces = [
        [np.frombuffer(row, dtype, count, 4 * place * count) for row, count in zip(rows, counts, strict=True)]
        for place, dtype in enumerate((np.int32, np.float32, np.int32))
    ]
    targets = (None,) * 3 if out is None else (out.tokens[:total], out.logprobs[:total], out.versions[:total])
    arrays = [np.concatenate(piece, out=target) for piece, target in zip(pieces, targets, strict=True)]
    return Batch(members=members, tokens=arrays[0], logprobs=arrays[1], versions=arrays[2])


class Dict:
    """A plain dict of NumPy copies: in memory, in this process, nothing survives."""

    def __init__(self, directory: Path, work: Workload) -> None:
        self._work = work
        self._rows: dict[int, tuple[Any, Any, Any]] = {}
        # A dict that grows touches new memory; what the round before freed must not spare it that.
        ctypes.CDLL(None).malloc_trim(0)

    def append(self, members: Sequence[int]) -> None:
        work = self._work
        for member in members:
            self._rows[member] = (
                work.tokens(member).copy(),
                work.logprobs(member).copy(),
                work.versions(member).copy(),
            )

    def flush(self) -> None:
        pass

    def read(self, groups: Sequence[int], out: Out | None) -> Batch:
        members = members_of(groups)
        columns = list(zip(*(self._rows[member] for member in members.tolist()), strict=True))
        total = sum(map(len, columns[0]))
        targets = (None,) * 3 if out is None else (out.tokens[:total], out.logprobs[:total], out.versions[:total])
        arrays = [np.concatenate(column, out=target) for column, target in zip(columns, targets, strict=True)]
        return Batch(members=members, tokens=arrays[0], logprobs=arrays[1], versions=arrays[2])

    def close(self) -> None:
        self._rows.clear()


class Lmdb:
    """LMDB: one synchronous write transaction for each 64."""

    def __init__(self, directory: Path, work: Workload) -> None:
        import lmdb

        self._work = work
        self._env = lmdb.open(str(directory), map_size=LMDB_MAP_BYTES, sync=True, metasync=True)

    def append(self, members: Sequence[int]) -> None:
        with self._env.begin(write=True) as transaction:
            for member in members:
                transaction.put(key_of(member), row_of(self._work, member))

    def flush(self) -> None:
        pass

    def read(self, groups: Sequence[int], out: Out | None) -> Batch:
        members = members_of(groups)
        with self._env.begin(buffers=True) as transaction:
            return pack(members, [transaction.get(key_of(member)) for member in members.tolist()], out)

    def close(self) -> None:
        self._env.close()


class RocksDb:
    """RocksDB through rocksdict: one write batch for each 64, its log synced; compression off."""

    def __init__(self, directory: Path, work: Workload) -> None:
        import rocksdict

        self._work = work
        self._rocksdict = rocksdict
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        self._db = rocksdict.Rdict(str(directory), options)
        self._synced = rocksdict.WriteOptions()
        self._synced.sync = True

    def append(self, members: Sequence[int]) -> None:
        batch = self._rocksdict.WriteBatch(raw_mode=True)
        for member in members:
            batch.put(key_of(member), row_of(self._work, member))
        self._db.write(batch, self._synced)

    def flush(self) -> None:
        pass

    def read(self, groups: Sequence[int], out: Out | None) -> Batch:
        members = members_of(groups)
        return pack(members, self._db.get([key_of(member) for member in members.tolist()]), out)

    def close(self) -> None:
        self._db.close()


class Sqlite:
    """SQLite: write-ahead log, synchronous=FULL, one transaction for each 64."""

    def __init__(self, directory: Path, work: Workload) -> None:
        self._work = work
        self._db = sqlite3.connect(directory / "store.db", isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")
        self._db.execute("create table trajectory (id integer primary key, row blob not null)")

    def append(self, members: Sequence[int]) -> None:
        self._db.execute("begin")
        rows = ((member, row_of(self._work, member)) for member in members)
        self._db.executemany("insert into trajectory values (?, ?)", rows)
        self._db.execute("commit")

    def flush(self) -> None:
        pass

    def read(self, groups: Sequence[int], out: Out | None) -> Batch:
        members = members_of(groups)
        query = "select row from trajectory where id between ? and ? order by id"
        rows = [row for group in groups for (row,) in self._db.execute(query, (8 * group, 8 * group + 7))]
        return pack(members, rows, out)

    def close(self) -> None:
        self._db.close()


class TransferQueue:
    """TransferQueue's simple storage: `kv_batch_put` of 64 to the memory of Ray actors."""

    def __init__(self, directory: Path, work: Workload) -> None:
        import tensordict
        import torch
        import transfer_queue

        self._work, self._tensordict, self._torch, self._queue = work, tensordict, torch, transfer_queue
        transfer_queue.init()

    def append(self, members: Sequence[int]) -> None:
        torch, work = self._torch, self._work
        columns = {
            name: torch.nested.as_nested_tensor([torch.from_numpy(get(m)) for m in members], layout=torch.jagged)
            for name, get in (("tokens", work.tokens), ("logprobs", work.logprobs), ("versions", work.versions))
        }
        fields = self._tensordict.TensorDict(columns, batch_size=len(members))
        self._queue.kv_batch_put(keys=[str(member) for member in members], partition_id="bench", fields=fields)

    def flush(self) -> None:
        pass

    def read(self, groups: Sequence[int], out: Out | None) -> Batch:
        members = members_of(groups)
        got = self._queue.kv_batch_get(keys=[str(member) for member in members.tolist()], partition_id="bench")
        arrays = {name: np.concatenate([row.numpy() for row in got[name].unbind()]) for name in got.keys()}  # noqa: SIM118
        return Batch(members=members, **arrays)

    def close(self) -> None:
        self._queue.close()


class RawSync:
    """`write` of 12 KB and `fdatasync`, each time, to a growing file."""

    def __init__(self, directory: Path, work: Workload) -> None:
        self._file = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT)
        self._row = bytes(12_000)

    def append(self, members: Sequence[int]) -> None:
        for _ in members:
            os.write(self._file, self._row)
            os.fdatasync(self._file)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        os.close(self._file)


class RawGather:
    """The copy that no store can avoid: the rows of a batch out of one array in memory, into reused memory.

    The rows lie in the order of `members`: as they arrived in a log, or sorted, as only a second copy could put them.
    """

    def __init__(self, work: Workload, members: Sequence[int]) -> None:
        rows = [np.frombuffer(row_of(work, member), np.uint8) for member in members]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).tolist()
        memory = np.concatenate(rows)
        self._rows = {member: memory[a:b] for member, (a, b) in zip(members, pairwise(starts), strict=True)}
        self._out = np.ones(BATCH * 8 * 8192 * BYTES_PER_TOKEN, np.uint8)

    def prepare(self, groups: Sequence[int]) -> Callable[[], object]:
        """The copy of one batch, ready to run."""
        rows = [self._rows[member] for member in members_of(groups).tolist()]
        out = self._out[: sum(map(len, rows))]
        return lambda: np.concatenate(rows, out=out)


def disk_bytes(directory: Path) -> int:
    """Bytes that the files of `directory` occupy."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def fresh(directory: Path) -> Path:
    """An empty directory, with nothing of earlier runs left to be written back."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    os.sync()
    return directory
