"""What does a dispatch decision cost when there is much to choose from? The store in memory, small against large.

    python bench/dispatch.py [--rounds 5]

A decision is one lease for a worker, and one append that gives the trajectory back. Both sizes are filled first: half
of the trajectories hold tokens of one of `VERSIONS` policy versions, and every worker, half of them a version behind,
holds one. Workers decide in random order. Rounds alternate between the sizes. Times are of the processor: nothing here
waits.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np

from pmdflow.store.facade import TrajectoryStore
from pmdflow.store.segments import encode_segments
from pmdflow.types import Lease, Prompt, Quota, Segment

SMALL, LARGE = (64, 10_000), (4_096, 1_000_000)
"""Workers and live trajectories."""
GROUP_SIZE = 8
VERSIONS = 4
DECISIONS = 2_000


class Filled:
    """A store with so many workers and trajectories."""

    def __init__(self, workers: int, trajectories: int) -> None:
        """Fill it."""
        groups = trajectories // GROUP_SIZE
        self._store = TrajectoryStore(
            None, groups_per_iteration=groups // 2, lookahead=1, max_staleness=None, lease_ttl_s=1e6
        )
        self._rng = np.random.default_rng(0)
        for version in range(VERSIONS):
            self._store.publish(version)
            self._store.set_quota(Quota(version=version, groups=groups, tokens=1 << 50, tokens_per_segment=None))
            for number in range(groups * version // VERSIONS, groups * (version + 1) // VERSIONS):
                prompt = Prompt(id=f"p{number}", text="", tokens=np.zeros(4, np.int32))
                self._store.admit(
                    f"train-{number}", prompt, cursor=number, group_size=GROUP_SIZE, max_tokens=1 << 20, wait=False
                )
            self._begin(version, trajectories // 2 // VERSIONS)
        self._versions = [VERSIONS - 1 - worker % 2 for worker in range(workers)]
        self._held = [self._lease(worker) for worker in range(workers)]

    def _begin(self, version: int, count: int) -> None:
        """Let so many trajectories that hold nothing have a token of this version; the others are held meanwhile."""
        held, begun = [], 0
        while begun < count:
            leases = self._store.lease("filler", version, 1024, 0.0)
            fresh = [lease for lease in leases if len(lease.prefix) == 0]
            held += [lease for lease in leases if len(lease.prefix)]
            self._give_back(fresh, version)
            begun += len(fresh)
            held += self._store.lease("filler", version, len(fresh), 0.0)
        self._give_back(held, version, tokens=0)

    def _lease(self, worker: int) -> Lease:
        return self._store.lease(f"worker-{worker}", self._versions[worker], 1, 0.0)[0]

    def _give_back(self, leases: list[Lease], version: int, *, tokens: int = 1) -> None:
        ids, logprobs = np.zeros(tokens, np.int32), np.zeros(tokens, np.float32)
        segments = [
            Segment(
                trajectory=lease.trajectory, epoch=lease.epoch, offset=len(lease.prefix), version=version,
                temperature=1.0, tokens=ids, logprobs=logprobs, next_version=version, stop="abort",
            )
            for lease in leases
        ]  # fmt: skip
        if segments:
            self._store.append(encode_segments(segments))

    def decide(self) -> float:
        """Microseconds of one decision, over many."""
        workers = self._rng.integers(len(self._held), size=DECISIONS).tolist()
        start = time.thread_time()
        for worker in workers:
            self._give_back([self._held[worker]], self._versions[worker])
            self._held[worker] = self._lease(worker)
        return (time.thread_time() - start) / DECISIONS * 1e6


def main() -> None:
    """Print both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sides = {size: Filled(*size) for size in (SMALL, LARGE)}
    found: dict[tuple[int, int], list[float]] = {size: [] for size in sides}
    for _ in range(options.rounds):
        for size, side in sides.items():
            found[size].append(side.decide())
    for (workers, trajectories), times in found.items():
        print(
            f"{workers:>5} workers, {trajectories:>9,} trajectories: {median(times):7.1f} us a decision {sorted(times)}"
        )
    ratios = sorted(large / small for small, large in zip(found[SMALL], found[LARGE], strict=True))
    print(f"large / small: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
