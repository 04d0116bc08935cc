"""How fast are appends and packed reads, against each peer? Questions of `bench/store.py`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import store_peers as peers
from store_ours import OneByOne, Ours
from store_paired import Answer, Rounds
from store_workload import GROUP_SIZE, Workload

from pmdflow.store import encode_segments

NUM_ALWAYS = 1000
NUM_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every question is given."""

    directory: Path
    rounds: int
    scale: float

    def size(self, trajectories: int) -> int:
        """So many trajectories, scaled, in whole batches of 64 groups."""
        return max(512, round(trajectories * self.scale))

    def workload(self) -> Workload:
        return Workload(self.size(20_000))


Make = Callable[[Path, Workload], peers.Subject]


def whole_run(make: Make, directory: Path, work: Workload) -> float:
    """Appends/s of a run that nothing interrupts: what a subject does in the background is in no other's time."""
    subject, batches = make(peers.fresh(directory), work), list(work.append_batches())
    start = time.perf_counter()
    for members in batches:
        subject.append(members)
    subject.flush()
    seconds = time.perf_counter() - start
    subject.close()
    return work.size / seconds


def race(makes: Mapping[str, Make], bench: Bench, work: Workload, *, chunk: int) -> Rounds:
    """Appends/s of each subject in each round, all of them in fresh directories.

    They take turns every `chunk` batches, so that whatever else the machine does slows them alike; what a subject
    promises for later is done before its turn ends.
    """
    rounds, batches, names = Rounds("appends/s"), list(work.append_batches()), list(makes)
    for _ in range(bench.rounds):
        subjects = {name: make(peers.fresh(bench.directory / name), work) for name, make in makes.items()}
        seconds = dict.fromkeys(names, 0.0)
        for first in range(0, len(batches), chunk):
            for name in names:
                start = time.perf_counter()
                for members in batches[first : first + chunk]:
                    subjects[name].append(members)
                subjects[name].flush()
                seconds[name] += time.perf_counter() - start
            names = names[1:] + names[:1]
        for name in makes:
            subjects[name].close()
            rounds.add(name, work.size / seconds[name])
    return rounds


def check_reads(make: Callable[[Path, Workload], peers.Readable], directory: Path) -> None:
    """Warm up on a small workload, and see that what is read is what was appended."""
    work = Workload(1024, seed=1)
    subject = make(peers.fresh(directory), work)
    for members in work.append_batches():
        subject.append(members)
    subject.flush()
    for groups in work.group_batches():
        work.check(subject.read(groups, None))
    subject.close()


def check_ours(directory: Path, **settings: Any) -> None:
    """The same of the store."""
    work = Workload(1024, seed=1)
    ours = Ours(peers.fresh(directory), work, **settings)
    for members in work.append_batches():
        ours.append(members)
    for iteration in ours.claim_all():
        for out in (None, ours.buffers()):
            work.check(ours.as_batch(ours.read_claim(iteration, out)))
    ours.close()


def durable_appends(bench: Bench) -> Answer:
    """64 trajectories a commit, the producer waits for the disk."""
    work = bench.workload()
    stores = {"lmdb": peers.Lmdb, "rocksdb": peers.RocksDb, "sqlite": peers.Sqlite}
    for name, make in stores.items():
        check_reads(make, bench.directory / name)
    check_ours(bench.directory / "ours")
    rounds = Rounds("appends/s")
    makes: dict[str, Make] = {"ours": Ours, **stores}
    rounds.run(
        bench.rounds, {name: partial(whole_run, make, bench.directory / name, work) for name, make in makes.items()}
    )
    return Answer(
        rounds=rounds,
        ratios=[
            rounds.ratio("ours", "lmdb", 1.5),
            rounds.fast_mode("ours", "lmdb", 1.5),
            rounds.ratio("ours", "rocksdb", 2.2),
            rounds.ratio("ours", "sqlite", 3.0),
        ],
        notes=("peers store 12 B a token, the store 8: a version is stored once a segment",),
    )


def pipelined_appends(bench: Bench) -> Answer:
    """The producer gets an LSN at once, and waits for the disk only every 4,096 trajectories."""
    work = bench.workload()
    check_reads(peers.Dict, bench.directory / "dict")
    check_ours(bench.directory / "ours", wait=False)
    rounds = race({"ours": partial(Ours, wait=False), "dict": peers.Dict}, bench, work, chunk=64)
    return Answer(rounds=rounds, ratios=[rounds.ratio("ours", "dict", 0.8)])


def appends_each_synced(bench: Bench) -> Answer:
    """One trajectory an append, each durable before the call returns."""
    work = Workload(bench.size(NUM_ALWAYS))

    makes = {"ours": partial(OneByOne, durability="always"), "write + fdatasync": peers.RawSync}
    rounds = race(makes, bench, work, chunk=1)
    return Answer(rounds=rounds, ratios=[rounds.ratio("ours", "write + fdatasync", 0.9)])


def packed_reads(bench: Bench) -> Answer:
    """Batches of 64 complete groups, from the page cache."""
    work = bench.workload()
    ours = Ours(peers.fresh(bench.directory / "ours"), work)
    lmdb = peers.Lmdb(peers.fresh(bench.directory / "lmdb"), work)
    for members in work.append_batches():
        ours.append(members)
        lmdb.append(members)
    batches = []
    for iteration in ours.claim_all():
        claim = ours.as_batch(ours.read_claim(iteration, None))
        work.check(claim)
        batches.append((iteration, (claim.members[::GROUP_SIZE] // GROUP_SIZE).tolist()))
    gather, sorted_gather = peers.RawGather(work, work.arrivals.tolist()), peers.RawGather(work, range(work.size))
    out, buffers = work.out(), ours.buffers()
    rounds = Rounds("ms a batch")
    for number in range(bench.rounds):
        seen: dict[str, list[float]] = {}
        for iteration, groups in batches:
            # Nobody's source is in the processor's caches, and each comes first as often as the others.
            calls: list[tuple[str, Callable[[], Any]]] = [
                ("raw gather", gather.prepare(groups)),
                ("raw gather, sorted", sorted_gather.prepare(groups)),
                ("ours, reused", partial(ours.read_claim, iteration, buffers)),
                ("lmdb, reused", partial(lmdb.read, groups, out)),
                ("ours, fresh and checked", partial(ours.read_claim, iteration, None)),
                ("lmdb, fresh", partial(lmdb.read, groups, None)),
            ]
            turn = (number + iteration) % len(calls)
            for name, call in calls[turn:] + calls[:turn]:
                start = time.perf_counter()
                batch = call()
                seen.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
                if not name.startswith("raw gather"):
                    work.check(ours.as_batch(batch) if name.startswith("ours") else batch)
                del batch
        for name, values in seen.items():
            rounds.add(name, median(values))
    ours.close()
    lmdb.close()
    return Answer(
        rounds=rounds,
        ratios=[
            rounds.ratio("ours, reused", "raw gather", 1.5, "at most"),
            rounds.ratio("ours, reused", "raw gather, sorted", None),
            rounds.ratio("lmdb, reused", "ours, reused", 3.5),
            rounds.ratio("lmdb, fresh", "ours, fresh and checked", 1.0),
        ],
        notes=("a batch of ours also has prompts, masks, temperatures and rewards: 17 B a token against 12",),
    )


def appending_threads(bench: Bench) -> Answer:
    """Four threads that wait for the disk, each with its share of the batches, against one."""
    work = bench.workload()

    def run(threads: int, *, encoded: bool) -> float:
        ours = Ours(peers.fresh(bench.directory / "ours"), work)
        batches = list(work.append_batches())
        ready: list[Any] = [encode_segments(ours.segments(b)) for b in batches] if encoded else []
        barrier = threading.Barrier(threads + 1)

        def append_share(first: int) -> None:
            barrier.wait()
            for number in range(first, len(batches), threads):
                ours.store.append(ready[number] if encoded else ours.segments(batches[number]))

        workers = [threading.Thread(target=append_share, args=(first,)) for first in range(threads)]
        for worker in workers:
            worker.start()
        barrier.wait()
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        rate = work.size / (time.perf_counter() - start)
        assert ours.store.counts().trajectories_unscored == work.size
        ours.close()
        return rate

    rounds = Rounds("appends/s")
    rounds.run(
        bench.rounds,
        {
            f"{threads} threads, {form}": partial(run, threads, encoded=form == "encoded")
            for form in ("segments", "encoded")
            for threads in (NUM_THREADS, 1)
        },
    )
    return Answer(
        rounds=rounds,
        ratios=[
            rounds.ratio("4 threads, segments", "1 threads, segments", None),
            rounds.ratio("4 threads, encoded", "1 threads, encoded", 2.0),
        ],
        notes=(f"{os.cpu_count()} cores; Python builds segments under its global lock, actors send them encoded",),
    )
