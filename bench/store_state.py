"""What a store costs as it grows, waits and opens again. Questions of `bench/store.py`."""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import store_peers as peers
from store_ours import NUM_VERSIONS, Ours, admit, lease, open_store, publish, publish_all, sync
from store_paired import Answer, Ratio, Rounds
from store_speed import Bench
from store_workload import GROUP_SIZE, Workload

from pmdflow.store import TrajectoryStore
from pmdflow.types import Segment

NUM_WAKEUPS = 1000
NUM_PARTIAL = 100_000
FLAT_CHUNK_GROUPS = 640
ONE_FILE_BYTES = 64 << 20
LONG_LOG_BYTES = 256 << 20


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
    return Answer(
        rounds=rounds, ratios=[Ratio(name="p99 of the claim, ms", values=(p99,), wanted=5.0, sense="at most")]
    )


def crashed_copy(directory: Path, to: Path) -> Path:
    """What a killed process would leave: the files as they are while the store is open, cached by being written."""
    shutil.rmtree(to, ignore_errors=True)
    subprocess.run(["cp", "--archive", "--sparse=always", str(directory), str(to)], check=True)
    return to


def opening(bench: Bench) -> Answer:
    """Opening after a crash: a long log that no snapshot covers, and many partial trajectories."""
    work = bench.workload()
    home = bench.directory / "ours"
    ours = Ours(peers.fresh(home), work, durability="os", file_bytes=LONG_LOG_BYTES)
    for members in work.append_batches():
        ours.append(members)
    size = ours.store.counts().bytes
    rounds, copy = Rounds("s"), bench.directory / "copy"
    for _ in range(bench.rounds):
        rounds.add("long log", timed_opening(crashed_copy(home, copy), work.size))
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
        rounds.add("partial trajectories", timed_opening(crashed_copy(home, copy), len(leases)))
    store.close()
    speeds = tuple(size / 1e9 / seconds for seconds in rounds.numbers["long log"])
    seconds = tuple(rounds.numbers["partial trajectories"])
    return Answer(
        rounds=rounds,
        ratios=[
            Ratio(name=f"scan of {size / 1e6:.0f} MB, GB/s", values=speeds, wanted=3.0),
            Ratio(name=f"opening with {len(leases):,} partial, s", values=seconds, wanted=2.0, sense="at most"),
        ],
        notes=("the clock runs from the constructor's call to its return; the log is in the page cache",),
    )


def timed_opening(directory: Path, trajectories: int) -> float:
    start = time.perf_counter()
    store = open_store(directory)
    seconds = time.perf_counter() - start
    counts = store.counts()
    assert counts.trajectories_idle + counts.trajectories_unscored == trajectories
    store.close()
    return seconds


def memory_and_disk(bench: Bench) -> Answer:
    """Anonymous memory of a process with the store open, bytes written, bytes on disk, at two payloads."""
    rounds, ratios = Rounds("MB"), []
    context = multiprocessing.get_context("spawn")
    for mean in (250.0, 1000.0):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            seen = pool.submit(measure_process, bench.directory / "ours", bench.size(20_000), mean).result()
        for name in ("payload", "anonymous", "written", "disk"):
            rounds.add(name, seen[name] / 1e6)
        limit = (64 << 20) + 256 * seen["trajectories"]
        ratios += [
            Ratio(
                name=f"anonymous / limit, mean {mean:g}",
                values=(seen["anonymous"] / limit,),
                wanted=1.0,
                sense="at most",
            ),
            Ratio(
                name=f"written / payload, mean {mean:g}",
                values=(seen["written"] / seen["payload"],),
                wanted=1.02,
                sense="at most",
            ),
            Ratio(
                name=f"written / payload of 8 B a token, mean {mean:g}",
                values=(1.5 * seen["written"] / seen["payload"],),
                wanted=1.02,
                sense="at most",
            ),
            Ratio(
                name=f"disk / (2 payload + a file), mean {mean:g}",
                values=(seen["disk"] / (2 * seen["payload"] + ONE_FILE_BYTES),),
                wanted=1.0,
                sense="at most",
            ),
        ]
    return Answer(rounds=rounds, ratios=ratios, notes=("limit: 64 MB + 256 B a trajectory",))


def measure_process(directory: Path, size: int, mean_tokens: float) -> dict[str, float]:
    """Append everything and read it in batches, in this process alone; growth in bytes."""
    work = Workload(size, mean_tokens=mean_tokens)
    ours = Ours(peers.fresh(directory), Workload(512))
    ours.append(list(range(64)))
    ours.close()
    before = anonymous_bytes()
    ours = Ours(peers.fresh(directory), work)
    written, most = written_bytes(), 0
    for number, members in enumerate(work.append_batches()):
        ours.append(members)
        if number % 8 == 0:
            most = max(most, anonymous_bytes() - before)
    written = written_bytes() - written
    disk = peers.disk_bytes(directory)
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
            self.store.score(trajectory, 0, "scored", 1.0)
        return rate

    def claim_ms(self, claims: int) -> float:
        """Median time to claim 64 groups and read them; they are then trained and evicted."""
        seen = []
        for _ in range(claims):
            version = NUM_VERSIONS - 1 + self._iteration
            start = time.perf_counter()
            assert self.store.claim(self._iteration, version, 60.0).status == "claimed"
            seen.append(1e3 * (time.perf_counter() - start))
            publish(self.store, version + 1, self._iteration)
            self.store.commit(self._iteration)
            self.store.evict(self._iteration)
            self._iteration += 1
        return float(np.median(seen))


def flat_cost(bench: Bench) -> Answer:
    """Appends and claims of short trajectories with a million in the store against 20,000, both open at once."""
    sizes = {"many": bench.size(1_000_000), "few": bench.size(20_000)}
    stores = {name: Population(bench.directory / name, size) for name, size in sizes.items()}
    rates, claims = Rounds("appends/s"), Rounds("ms a claim")
    claim_rounds = FLAT_CHUNK_GROUPS // 64
    for _ in range(bench.rounds):
        for name, population in stores.items():
            rates.add(f"{name}: appends/s", population.appends_per_s(FLAT_CHUNK_GROUPS))
            claims.add(f"{name}: claim ms", population.claim_ms(claim_rounds))
    for population in stores.values():
        population.store.close()
    both = Rounds("appends/s or ms", rates.numbers | claims.numbers)
    return Answer(
        rounds=both,
        ratios=[
            both.ratio("many: appends/s", "few: appends/s", 0.8),
            both.ratio("many: claim ms", "few: claim ms", 1.2, "at most"),
        ],
        notes=(f"{sizes['many']:,} against {sizes['few']:,} trajectories, level `os`",),
    )
