"""What does a dispatch decision cost when there is much to choose from? The store in memory, small against large.

    python bench/dispatch.py [--rounds 5]

A decision is one lease for a worker, and one append that gives the trajectory back. Both sizes are filled first: half
of the trajectories hold tokens, and every worker holds one. Rounds alternate between the sizes. Times are of the
processor: nothing here waits.
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
DECISIONS = 2_000


class Filled:
    """A store with so many workers and trajectories."""

    def __init__(self, workers: int, trajectories: int) -> None:
        """Fill it."""
        groups = trajectories // GROUP_SIZE
        self._store = TrajectoryStore(
            None, groups_per_iteration=groups, lookahead=0, max_staleness=None, lease_ttl_s=1e6
        )
        self._store.publish(0)
        self._store.set_quota(Quota(version=0, groups=groups, tokens=1 << 50, tokens_per_segment=None))
        for number in range(groups):
            prompt = Prompt(id=f"p{number}", text="", tokens=np.zeros(4, np.int32))
            self._store.admit(
                f"train-{number}", prompt, cursor=number, group_size=GROUP_SIZE, max_tokens=1 << 20, wait=False
            )
        for _ in range(trajectories // 2 // 1024 + 1):
            self._give_back(self._store.lease("filler", 0, 1024, 0.0))
        self._held = [self._store.lease(f"worker-{worker}", 0, 1, 0.0)[0] for worker in range(workers)]

    def _give_back(self, leases: list[Lease]) -> None:
        tokens, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
        self._store.append(
            encode_segments(
                [
                    Segment(
                        trajectory=lease.trajectory, epoch=lease.epoch, offset=len(lease.prefix), version=0,
                        temperature=1.0, tokens=tokens, logprobs=logprobs, next_version=0, stop="abort",
                    )
                    for lease in leases
                ]
            )
        )  # fmt: skip

    def decide(self) -> float:
        """Microseconds of one decision, over many."""
        start = time.thread_time()
        for number in range(DECISIONS):
            worker = number % len(self._held)
            self._give_back([self._held[worker]])
            self._held[worker] = self._store.lease(f"worker-{worker}", 0, 1, 0.0)[0]
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
