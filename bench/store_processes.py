"""Appends through a process boundary: TransferQueue against our store actor. A question of `bench/store.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import store_peers as peers
from store_ours import Ours, Segments
from store_paired import Answer
from store_speed import Bench, check_reads, race
from store_workload import BATCH_GROUPS, GROUP_SIZE, NUM_VERSIONS, Workload

from pmdflow.store import encode_segments
from pmdflow.store.actor import StoreActor
from pmdflow.types import Prompt, Quota

GROUPS = {"lease": 2, "append": 2, "score": 2, "claim": 2, "read": 2, "evict": 1}
TIMEOUT_S = 120.0


class OurActor:
    """The store inside its Ray actor; an append is answered once it is durable."""

    def __init__(self, directory: Path, work: Workload, *, cls: Any = None, groups: int = BATCH_GROUPS) -> None:
        cls = cls or ray.remote(num_cpus=0, concurrency_groups=GROUPS, max_concurrency=4)(StoreActor)
        settings = {"groups_per_iteration": groups, "lookahead": 1_000_000, "max_staleness": None, "lease_ttl_s": 1e6}
        self.actor = cls.remote(
            directory=str(directory / "store"),
            settings=settings,
            steps_per_iteration=1,
            seed=0,
        )
        for version in range(NUM_VERSIONS):
            self.call("publish", version, None, {})
            self.call("set_quota", Quota(version=version, groups=1 << 30, tokens=1 << 40, tokens_per_segment=None))
        tokens = np.array([1], dtype=np.int32)
        prompts = [(f"g{g}", g, Prompt(id=f"p{g}", text="", tokens=tokens)) for g in range(work.num_groups)]
        assert len(self.call("admit", prompts, "train", GROUP_SIZE, 8192)) == work.num_groups
        rows: list[tuple[int, int]] = []
        while len(rows) < work.size:
            leases = self.call("lease", "bench", NUM_VERSIONS - 1, 4096, TIMEOUT_S)
            rows += [(lease.trajectory, lease.epoch) for lease in leases]
        self.segments = Segments(work, np.array(sorted(rows), dtype=np.int64))

    def call(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self.actor, method).remote(*args), timeout=TIMEOUT_S)

    def append(self, members: Sequence[int]) -> None:
        self.call("append", np.frombuffer(encode_segments(self.segments(members)), np.uint8))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.call("close")
        ray.kill(self.actor)


def across_processes(bench: Bench) -> Answer:
    """64 trajectories a call to another process; TransferQueue keeps them in memory, the store on disk."""
    work = bench.workload()
    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        check_reads(peers.TransferQueue, bench.directory / "tq")
        makes = {"ours": Ours, "our actor": OurActor, "transferqueue": peers.TransferQueue}
        rounds = race(makes, bench, work, chunk=16)
    finally:
        ray.shutdown()
    return Answer(
        rounds=rounds,
        ratios=[rounds.ratio("ours", "transferqueue", 15.0), rounds.ratio("our actor", "transferqueue", 3.0)],
    )
