"""The iterations of a run on a real store, without actors: it generates at random, trains, checkpoints and crashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from pmdflow.metrics.claim import staleness_of
from pmdflow.run.scheduler import SchedulerSettings, next_quota
from pmdflow.store.plan import deal
from pmdflow.types import Lease, Mask, Segment, TrainBatch
from tests.support.filled_store import admit, open_store, score_all

GROUPS = 2
VOCAB = 128


class ResumedLoop:
    """Knows of every version how many iterations its weights have trained, and of every claim what it was at first."""

    def __init__(self, path: Path | None = None, *, seed: int, lookahead: int, max_staleness: int, every: int) -> None:
        self.random = Random(seed)
        self.store = open_store(
            path, groups_per_iteration=GROUPS, lookahead=lookahead, max_staleness=max_staleness, grant_tokens=64
        )
        self.limit, self._every, self._most = max_staleness, every, GROUPS * (lookahead + 1)
        self.iteration = self.version = 0
        self.checkpoint = (0, 0)
        self.trained = {0: 0}
        self.claims: dict[int, TrainBatch] = {}
        self._settings = SchedulerSettings(
            groups_per_iteration=GROUPS, tokens_per_iteration=1 << 20, tokens_per_segment=None, lookahead=lookahead,
            max_staleness=max_staleness,
        )  # fmt: skip
        self.store.publish(0)
        self._grant()

    def iterate(self, train: Callable[[TrainBatch], object] = lambda batch: None) -> None:
        """One claim, trained and published; a checkpoint where one is due."""
        self._admit()
        iteration, number = self.iteration + 1, 0
        while self.store.claim(iteration, self.version, 0.0).status != "claimed":
            self._admit()
            self._generate(finish=number > 1)
            number += 1
        if self.store.plan(iteration) is None:
            self.store.record_plan(iteration, deal(self.store.read_rows(iteration), 2, seed=iteration))
        batch = self.store.read_claim(iteration)
        self._check(batch)
        train(batch)
        self.version += 1
        self.store.publish(self.version, iteration)
        self._grant()
        self.iteration = self.trained[self.version] = iteration
        self._generate(finish=False)
        if iteration % self._every == 0:
            self.checkpoint = iteration, self.version
            self.store.commit(iteration)

    def crash(self) -> None:
        """The learner goes back to its newest checkpoint, as `Controller.recover` has it."""
        self.iteration, restored = self.checkpoint
        self.store.uncommit(self.iteration)
        newest = self.store.counts().max_version
        if newest > restored:
            self.version = newest + 1
            self.store.restore(self.version, weights_of=restored)
            self.store.restore(self.version, weights_of=restored)  # Ray may lose an answer
            self._grant()
        self.trained[self.version] = self.iteration

    def _grant(self) -> None:
        self.store.set_quota(next_quota(self._settings, self.store.counts()))

    def _admit(self) -> None:
        for _ in range(self._most - self.store.counts().groups_untrained):
            admit(self.store, self.store.counts().next_cursor, size=3, max_tokens=400)

    def _generate(self, *, finish: bool) -> None:
        behind = self.version - self.random.randint(0, int(self.version - 1 in self.trained))
        for lease in self.store.lease("worker", behind, 100, 0.0):
            stop = "stop" if finish or len(lease.prefix) or self.random.random() < 0.5 else "budget"
            self.store.append([segment_of(lease, self.random.randint(1, 6), version=behind, stop=stop)])
        score_all(self.store)

    def _check(self, batch: TrainBatch) -> None:
        first = self.claims.setdefault(batch.iteration, batch)
        for name in ("tokens", "versions", "mask", "groups", "rewards"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(first, name), err_msg=name)
        np.testing.assert_array_equal(batch.plan.steps, first.plan.steps)
        generated = (batch.mask & Mask.GENERATED) != 0
        made_by = np.array([self.trained[version] for version in batch.versions[generated].tolist()])
        ages = np.maximum(self.trained[batch.version] - made_by, 0)
        np.testing.assert_array_equal(staleness_of(batch, batch.versions[generated]), ages)
        np.testing.assert_array_equal((batch.mask[generated] & Mask.OVER_AGE) != 0, ages > self.limit)


def segment_of(lease: Lease, count: int, *, version: int, stop: str) -> Segment:
    """Tokens that the small models know."""
    tokens = np.random.default_rng((lease.trajectory, len(lease.prefix))).integers(1, VOCAB, count, dtype=np.int32)
    return Segment(
        trajectory=lease.trajectory, epoch=lease.epoch, offset=len(lease.prefix), version=version, temperature=1.0,
        tokens=tokens, logprobs=-tokens.astype(np.float32) / 32, next_version=version, stop=stop,
    )  # fmt: skip
