"""What a store costs as it grows, waits and opens again. Questions of `bench/store.py`."""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import store_peers as peers
from store_ours import Ours, admit, lease, open_store, publish, publish_all, sync
from store_paired import Answer, Ratio, Rounds, at_least, at_most
from store_speed import Bench
from store_workload import BATCH_GROUPS, GROUP_SIZE, NUM_VERSIONS, Workload

from pmdflow.store import BatchBuffers, TrajectoryStore
from pmdflow.types import Segment

NUM_WAKEUPS = 1000
NUM_PARTIAL = 100_000
FLAT_CHUNK_GROUPS = 640
FLAT_TURNS = 3
"""Short ones, in each round."""
ONE_FILE_BYTES = 64 << 20


def short_segments(
    leases: np.ndarray[tuple[int, int], np.dtype[np.int64]], *, stop: bool, count: int = 16
) -> list[Segment]:
    """One segment of `count` tokens for each lease."""
    tokens, logprobs = np.arange(count, dtype=np.int32), np.zeros(count, dtype=np.float32)
    return [
        Segment(
            trajectory=trajectory,
            epoch=epoch,
            offset=0,
            version=0,
            temperature=1.0,
            tokens=tokens,
            logprobs=logprobs,
            next_version=NUM_VERSIONS - 1,
            stop="stop" if stop else "budget",
        )
        for trajectory, epoch in leases.tolist()
    ]


def wakeup(bench: Bench) -> Answer:
    """From the score that makes a group ready to the return of the claim that waits for it."""
    store = open_store(peers.fresh(bench.directory / "ours"), groups_per_iteration=1)
    publish_all(store)
    orders: queue.Queue[tuple[int, int] | None] = queue.Queue()
    returned: queue.Queue[float] = queue.Queue()

    def wait_for_claims() -> None:
        while (order := orders.get()) is not None:
            assert store.claim(*order, 60.0).status == "claimed"
            returned.put(time.perf_counter())

    waiter = threading.Thread(target=wait_for_claims)
    waiter.start()
    latencies, durable = [], []
    for number in range(bench.size(NUM_WAKEUPS)):
        version = NUM_VERSIONS - 1 + number
        admit(store, [number], size=2)
        leases = lease(store, 2, version=version)
        store.append(short_segments(leases, stop=True))
        first, second = leases[:, 0].tolist()
        store.score(first, 0, "scored", 0.0)
        orders.put((number, version))
        time.sleep(0.001)  # the claim is to wait already; if it does not, it is only slower
        start = time.perf_counter()
        store.score(second, 0, "scored", 1.0)
        durable.append(1e3 * (time.perf_counter() - start))
        latencies.append(1e3 * (returned.get(timeout=60.0) - start))
        publish(store, version + 1, number)
        store.commit(number)
        if number % 64 == 63:
            store.evict(number)
    orders.put(None)
    waiter.join()
    store.close()
    rounds = Rounds("ms", {"claim after score": latencies, "the score itself": durable})
    p99 = float(np.percentile(latencies, 99))
    return Answer(rounds=rounds, ratios=[at_most("p99 of the claim, ms", 5.0, p99)])


def crashed_copy(directory: Path, to: Path) -> Path:
    """What a killed process would leave: the files as they are while the store is open; cached, and on disk."""
    shutil.rmtree(to, ignore_errors=True)
    subprocess.run(["cp", "--archive", "--sparse=always", str(directory), str(to)], check=True)
    subprocess.run(["sync", *map(str, to.iterdir())], check=True)
    return to


def opening(bench: Bench) -> Answer:
    """Opening after a crash: a long log that no snapshot covers, and many partial trajectories."""
    work = bench.workload()
    home = bench.directory / "ours"
    # One file, and little of it empty: 8 B a token, and frames.
    ours = Ours(peers.fresh(home), work, wait=False, file_bytes=round(0.7 * work.payload_bytes))
    for members in work.append_batches():
        ours.append(members)
    ours.flush()
    size = ours.store.counts().bytes
    rounds, copy = Rounds("s"), bench.directory / "copy"
    for _ in range(bench.rounds):
        wall_s, cpu_s = timed_opening(crashed_copy(home, copy), work.size)
        rounds.add("long log", wall_s)
        rounds.add("long log, CPU time", cpu_s)
    ours.close()
    store = open_store(peers.fresh(home), durability="os")
    publish_all(store)
    count = bench.size(NUM_PARTIAL)
    admit(store, range(count // GROUP_SIZE))
    leases = lease(store, count // GROUP_SIZE * GROUP_SIZE)
    for start in range(0, len(leases), 64):
        store.append(short_segments(leases[start : start + 64], stop=False, count=64), wait=False)
    sync(store)
    for _ in range(bench.rounds):
        wall_s, _ = timed_opening(crashed_copy(home, copy), len(leases))
        rounds.add("partial trajectories", wall_s)
    store.close()
    speeds = [size / 1e9 / seconds for seconds in rounds.numbers["long log, CPU time"]]
    return Answer(
        rounds=rounds,
        ratios=[
            at_least(f"scan of {size / 1e6:.0f} MB, GB a CPU second", 3.0, *speeds),
            at_most(f"opening with {len(leases):,} partial, s", 2.0, *rounds.numbers["partial trajectories"]),
        ],
        notes=(
            "the log is in the page cache; opening also syncs, which CPU time leaves out, and other processes' work",
        ),
    )


def timed_opening(directory: Path, trajectories: int) -> tuple[float, float]:
    """Wall and CPU seconds of opening."""
    start, start_cpu = time.perf_counter(), time.process_time()
    store = open_store(directory)
    seconds = time.perf_counter() - start, time.process_time() - start_cpu
    counts = store.counts()
    assert counts.trajectories_idle + counts.trajectories_unscored == trajectories
    store.close()
    return seconds


def memory_and_disk(bench: Bench) -> Answer:
    """Anonymous memory of a process with the store open, bytes written, bytes on disk, at two payloads."""
    rounds, ratios = Rounds("MB"), list[Ratio]()
    context = multiprocessing.get_context("spawn")
    for mean in (250.0, 1000.0):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            seen = pool.submit(measure_process, bench.directory / "ours", bench.size(20_000), mean).result()
        for name in ("payload", "anonymous", "written", "disk"):
            rounds.add(name, seen[name] / 1e6)
        limit = (64 << 20) + 256 * seen["trajectories"]
        payload, written = seen["payload"], seen["written"]
        ratios += [
            at_most(f"anonymous / limit, mean {mean:g}", 1.0, seen["anonymous"] / limit),
            at_most(f"written / payload, mean {mean:g}", 1.02, written / payload),
            at_most(f"written / payload of 8 B a token, mean {mean:g}", 1.02, 1.5 * written / payload),
            at_most(f"disk / (2 payload + a file), mean {mean:g}", 1.0, seen["disk"] / (2 * payload + ONE_FILE_BYTES)),
        ]
    return Answer(rounds=rounds, ratios=ratios, notes=("limit: 64 MB + 256 B a trajectory",))


def measure_process(directory: Path, size: int, mean_tokens: float) -> dict[str, float]:
    """Append everything and read it in batches, in this process alone; growth in bytes."""
    work = Workload(size, mean_tokens=mean_tokens)
    ours = Ours(peers.fresh(directory), Workload(512))
    ours.append(list(range(64)))
    ours.close()
    buffers = BatchBuffers.allocate(work.out().tokens.size)
    for field in fields(buffers):
        getattr(buffers, field.name).fill(1)
    before = anonymous_bytes()
    ours, most = Ours(peers.fresh(directory), work), 0
    written = written_bytes()
    for number, members in enumerate(work.append_batches()):
        ours.append(members)
        if number % 8 == 0:
            most = max(most, anonymous_bytes() - before)
    written, disk = written_bytes() - written, peers.disk_bytes(directory)
    for iteration in ours.claim_all():
        ours.read_claim(iteration, buffers)
        most = max(most, anonymous_bytes() - before)
    ours.close()
    return {
        "trajectories": work.size,
        "payload": work.payload_bytes,
        "anonymous": most,
        "written": written,
        "disk": disk,
    }


def anonymous_bytes() -> int:
    """Proportional set size without pages of files [bytes]."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[name].split()[0]) << 10 for name in ("Pss_Anon", "Pss_Shmem"))


def written_bytes() -> int:
    """Bytes that this process gave to write() and its like."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"])


class Population:
    """A store that keeps `size` complete trajectories ready to be claimed."""

    def __init__(self, directory: Path, size: int) -> None:
        self.store: TrajectoryStore = open_store(peers.fresh(directory), durability="os")
        publish_all(self.store)
        self._groups = self._iteration = 0
        while self._groups * GROUP_SIZE < size:
            self.appends_per_s(min(FLAT_CHUNK_GROUPS, size // GROUP_SIZE - self._groups))

    def appends_per_s(self, groups: int) -> float:
        """Admit, lease, append and score new groups; the rate of the appends."""
        admit(self.store, range(self._groups, self._groups + groups))
        self._groups += groups
        leases = lease(self.store, groups * GROUP_SIZE, version=NUM_VERSIONS - 1 + self._iteration)
        start = time.perf_counter()
        for first in range(0, len(leases), 64):
            self.store.append(short_segments(leases[first : first + 64], stop=True))
        sync(self.store)
        rate = len(leases) / (time.perf_counter() - start)
        for trajectory in leases[:, 0].tolist():
            self.store.score(trajectory, 0, "scored", 1.0, wait=False)
        return rate

    def claims_ms(self, claims: int) -> tuple[float, float]:
        """Median times to claim 64 groups, and to claim and read them; they are then trained and evicted."""
        claimed, read = [], []
        for _ in range(claims):
            version = NUM_VERSIONS - 1 + self._iteration
            start = time.perf_counter()
            assert self.store.claim(self._iteration, version, 60.0).status == "claimed"
            claimed.append(1e3 * (time.perf_counter() - start))
            self.store.read_claim(self._iteration)
            read.append(1e3 * (time.perf_counter() - start))
            publish(self.store, version + 1, self._iteration)
            self.store.commit(self._iteration)
            self.store.evict(self._iteration)
            self._iteration += 1
        return float(np.median(claimed)), float(np.median(read))


def flat_cost(bench: Bench) -> Answer:
    """Appends and claims of short trajectories with a million in the store against 20,000, both open at once."""
    sizes = {"many": bench.size(1_000_000), "few": bench.size(20_000)}
    stores = {name: Population(bench.directory / name, size) for name, size in sizes.items()}
    rounds = Rounds("(unit in the name)")
    for number in range(FLAT_TURNS * bench.rounds):
        for name in sorted(stores, reverse=number % 2 == 1):
            rounds.add(f"{name}, appends/s", stores[name].appends_per_s(FLAT_CHUNK_GROUPS))
            claimed, read = stores[name].claims_ms(FLAT_CHUNK_GROUPS // BATCH_GROUPS)
            rounds.add(f"{name}, claim ms", claimed)
            rounds.add(f"{name}, claim and read ms", read)
    for population in stores.values():
        population.store.close()
    return Answer(
        rounds=rounds,
        ratios=[
            rounds.ratio("many, appends/s", "few, appends/s", 0.8),
            rounds.ratio("many, claim ms", "few, claim ms", 1.2, "at most"),
            rounds.ratio("many, claim and read ms", "few, claim and read ms", 1.2, "at most"),
        ],
        notes=(f"{sizes['many']:,} against {sizes['few']:,} trajectories, level `os`",),
    )
