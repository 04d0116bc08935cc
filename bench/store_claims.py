"""A claim from the store actor to two learner ranks: each its own part, or the whole claim to both. For `store.py`."""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import ray
import store_peers as peers
from store_paired import Answer, Ratio, Rounds
from store_processes import GROUPS, TIMEOUT_S, OurActor
from store_speed import Bench
from store_workload import GROUP_SIZE, NUM_VERSIONS, Workload

from pmdflow.store.actor import StoreActor
from pmdflow.types import Claim, TrainBatch

TRAJECTORIES = 4096
"""Of about 1,000 tokens each: 4.1 million."""
RANKS = 2


class Store(StoreActor):
    """Beside what it does today, the way of before: the whole claim, 17 bytes a token, to every rank."""

    @ray.method(concurrency_group="claim")
    def read_claim(self, iteration: int) -> TrainBatch:
        return self._store.read_claim(iteration)


class Rank:
    """What a learner rank does for its tokens, before it packs them."""

    def __init__(self, rank: int, store: Any) -> None:
        self._rank, self._store = rank, store

    def take_own(self, claim: Claim, *, touch: bool) -> tuple[int, int]:
        """Every other trajectory; the bytes that came for them, and a sum of what is in them."""
        own = claim.trajectories[self._rank :: RANKS]
        tokens = ray.get(self._store.read_tokens.remote(own), timeout=TIMEOUT_S)
        total = int(tokens.tokens.sum(dtype=np.int64)) if touch else 0
        if touch:
            tokens.logprobs.sum()
        return tokens.tokens.nbytes + tokens.logprobs.nbytes, total

    def take_whole(self, batch: TrainBatch, *, touch: bool) -> tuple[int, int]:
        arrays = [getattr(batch, field.name) for field in fields(batch)]
        moved = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        if not touch:
            return moved, 0
        total = 0
        for row in range(self._rank, len(batch.rewards), RANKS):
            part = slice(*batch.cu_seqlens[row : row + 2])
            total += int(batch.tokens[part].sum(dtype=np.int64))
            for column in (batch.logprobs, batch.versions, batch.temperatures, batch.mask):
                column[part].sum()
        return moved, total


class Claimed:
    """A store actor whose one claim has the whole workload, and two ranks."""

    def __init__(self, bench: Bench, work: Workload) -> None:
        cls: Any = ray.remote(num_cpus=0, concurrency_groups=GROUPS, max_concurrency=4)(Store)
        self._ours = OurActor(peers.fresh(bench.directory / "claims"), work, cls=cls, groups=work.num_groups)
        for members in work.append_batches():
            self._ours.append(members)
        first = self._ours.segments.first
        scores = [(trajectory, 0, "scored", 1.0, {}) for trajectory in range(first, first + work.size)]
        self._ours.call("score", scores)
        assert self._ours.call("claim", 1, NUM_VERSIONS - 1, TIMEOUT_S).status == "claimed"
        self._store = self._ours.actor
        rank: Any = ray.remote(num_cpus=0)(Rank)
        self._ranks = [rank.remote(number, self._store) for number in range(RANKS)]
        claim = self._ours.call("read_rows", 1)
        self.tokens = int(claim.cu_seqlens[-1])
        self.moved: dict[str, int] = {}
        self.sums: set[int] = set()

    def own(self, name: str, *, touch: bool) -> float:
        return self._timed(name, lambda: self._store.read_rows.remote(1), "take_own", touch)

    def whole(self, name: str, *, touch: bool) -> float:
        return self._timed(name, lambda: self._store.read_claim.remote(1), "take_whole", touch)

    def _timed(self, name: str, read: Callable[[], Any], method: str, touch: bool) -> float:
        start = time.perf_counter()
        claim = read()
        answers = [getattr(rank, method).remote(claim, touch=touch) for rank in self._ranks]
        taken = ray.get(answers, timeout=TIMEOUT_S)
        seconds = time.perf_counter() - start
        self.moved[name] = sum(moved for moved, _ in taken)
        if touch:
            self.sums.add(sum(total for _, total in taken))
        return 1e3 * seconds

    def close(self) -> None:
        self._ours.close()


def first_touch(source: np.ndarray[Any, Any]) -> float:
    """Milliseconds of copying into memory that nobody has touched."""
    start = time.perf_counter()
    with mmap.mmap(-1, source.nbytes) as memory:
        target = np.frombuffer(memory, np.uint8)
        np.copyto(target, source)
        seconds = time.perf_counter() - start
        del target
    return 1e3 * seconds


def claim_to_ranks(bench: Bench) -> Answer:
    """4.1M tokens from the store actor to two learner ranks: each its own part, or the whole to both."""
    work = Workload(bench.size(TRAJECTORIES))
    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        claimed = Claimed(bench, work)
        sources = {8: np.ones(8 * claimed.tokens, np.uint8), 17: np.ones(17 * claimed.tokens, np.uint8)}
        subjects = {
            "own parts": partial(claimed.own, "own parts", touch=False),
            "own parts, every byte read": partial(claimed.own, "own parts, every byte read", touch=True),
            "whole claim": partial(claimed.whole, "whole claim", touch=False),
            "whole claim, own bytes read": partial(claimed.whole, "whole claim, own bytes read", touch=True),
            "first-touch copy, 8 B a token": partial(first_touch, sources[8]),
            "first-touch copy, 17 B a token": partial(first_touch, sources[17]),
        }
        Rounds("ms").run(2, subjects)  # Ray's memory and the page cache are warm, as in a run's later iterations
        rounds = Rounds("ms")
        rounds.run(bench.rounds, subjects)
        claimed.close()
    finally:
        ray.shutdown()
    assert len(claimed.sums) == 1, "both ways give the same tokens"
    assert claimed.moved["own parts"] == 8 * claimed.tokens, "each rank is given its own tokens and no others"
    copy = "first-touch copy, 8 B a token"
    ratios: list[Ratio] = [
        rounds.ratio("own parts", copy, 2.0, "at most"),
        rounds.ratio("own parts, every byte read", copy, None),
        rounds.ratio("whole claim", copy, None),
        rounds.ratio("whole claim", "own parts", None),
    ]
    notes = tuple(f"{name}: {moved / claimed.tokens:.1f} B a token given" for name, moved in claimed.moved.items())
    note = f"{work.size} trajectories in groups of {GROUP_SIZE}, {claimed.tokens:,} tokens with prompts, {RANKS} ranks"
    return Answer(rounds=rounds, ratios=ratios, notes=(note, *notes))
