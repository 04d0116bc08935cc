"""The program that `test_crash.py` kills: threads that use one store through its public API until they die.

A server: for each line of its input it forks a child that runs `live`, and says when that child is dead. The child
writes a line to the common output before and after each call that changes state; a line is one atomic write.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from pmdflow.store import StoreFull, TrajectoryStore
from pmdflow.types import Float32, Int32, Lease, Mask, Outcome, Prompt, Quota, Segment

Durability = Literal["os", "group", "always"]

GROUP_SIZE = 2
TIMEOUT_S = 30.0
PATIENCE_S = 0.02
VOCABULARIES = (150_000, 32_000)
"""Sizes of two vocabularies, for trajectories in turn."""
ZIPF = 1.3
TABLE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much a life writes."""

    max_tokens: int
    most_groups: int
    file_bytes: int
    """Small, so that the log often begins a new file."""
    leases: int
    """Trajectories of one append."""
    append_tokens: tuple[int, int]
    """Least and most of one append, on a logarithmic scale."""


LOADS = {
    "small": Load(max_tokens=48, most_groups=24, file_bytes=16 << 10, leases=4, append_tokens=(4, 48)),
    "large": Load(max_tokens=80_000, most_groups=6, file_bytes=1 << 20, leases=8, append_tokens=(8 << 10, 512 << 10)),
}
"""An append of the large one is 64 KB to 4 MB."""


def open_store(directory: Path, load: str, durability: Durability = "group") -> TrajectoryStore:
    return TrajectoryStore(
        directory,
        groups_per_iteration=3,
        lookahead=100,
        max_staleness=None,
        grant_tokens=LOADS[load].max_tokens,
        file_bytes=LOADS[load].file_bytes,
        durability=durability,
    )


def _table(vocabulary: int) -> Int32:
    """Ids as frequent as those of a text: what a torn record leaves of them may look like anything."""
    draws = np.random.default_rng(vocabulary).random(TABLE)
    return ((draws ** (-1 / (ZIPF - 1)) - 1) % vocabulary).astype(np.int32)


_TABLES = [_table(vocabulary) for vocabulary in VOCABULARIES]


def prompt_of(number: int) -> Prompt:
    """Content of admission `number`."""
    tokens = np.arange(number, number + 1 + number % 5, dtype=np.int32)
    return Prompt(id=f"p{number}", text="", tokens=tokens, metadata={"number": number})


def tokens_of(trajectory: int, offset: int, count: int) -> Int32:
    """Content of a trajectory; whoever reads it back computes it again."""
    places = np.arange(offset, offset + count) + trajectory * 104729
    return _TABLES[trajectory % len(_TABLES)].take(places, mode="wrap")


def logprobs_of(trajectory: int, offset: int, count: int) -> Float32:
    return -(tokens_of(trajectory, offset, count) % 1021).astype(np.float32) / 64


def outcome_of(trajectory: int, attempt: int) -> tuple[Outcome, float]:
    """Verdict of a scoring attempt: now and then a failure that is tried again."""
    if attempt == 0 and trajectory % 11 == 0:
        return "infra_failure", 0.0
    return ("invalid", 0.0) if trajectory % 13 == 0 else ("scored", trajectory % 7 / 7)


def report(*line: Any) -> None:
    data = json.dumps(line).encode() + b"\n"
    assert os.write(1, data) == len(data)


def fail() -> NoReturn:
    """The test is to see whatever went wrong; if it listens no more, this ends the child too."""
    try:
        report("error", traceback.format_exc()[-3000:])
    finally:
        os._exit(1)


class Life:
    """One life of the child, from opening the store to the kill."""

    def __init__(self, directory: Path, seed: int, committed: int, load: str, durability: Durability) -> None:
        """Open and resume as the controller does: undo the claims after the checkpoint, publish an unused version."""
        report("opening")
        self._load = LOADS[load]
        self._store = store = open_store(directory, load, durability)
        self._seed, self._committed = seed, committed
        report("uncommitted", store.uncommit(committed))
        if committed >= 0:
            store.commit(committed)
        self._publish(store.counts().max_version + 1, None)
        report("open", store.counts().lsn)

    def run(self) -> None:
        loops: list[Callable[[np.random.Generator], None]] = [self._admit, self._score, self._learn]
        loops += [self._roll_out, self._roll_out_pipelined]
        for number, loop in enumerate(loops):
            generator = np.random.default_rng([self._seed, number])
            threading.Thread(target=self._guarded, args=(loop, generator)).start()

    def _guarded(self, loop: Callable[[np.random.Generator], None], random: np.random.Generator) -> None:
        try:
            while True:
                loop(random)
        except BaseException:
            fail()

    def _publish(self, version: int, iteration: int | None) -> None:
        report("publishing", version, iteration)
        self._store.publish(version, iteration)
        report("published", version, iteration)
        groups = self._load.most_groups
        self._store.set_quota(Quota(version=version, groups=groups, tokens=1 << 40, tokens_per_segment=None))

    def _admit(self, random: np.random.Generator) -> None:
        number = self._store.counts().next_cursor
        report("admitting", number)
        with contextlib.suppress(StoreFull):
            prompt, most = prompt_of(number), self._load.max_tokens
            group = self._store.admit(f"r{number}", prompt, group_size=GROUP_SIZE, max_tokens=most, cursor=number)
            report("admitted", number, group)
            return
        time.sleep(PATIENCE_S)

    def _leases(self, name: str) -> list[Lease]:
        leases = self._store.lease(name, self._store.counts().version, self._load.leases, PATIENCE_S)
        if leases:
            report("leased", [(lease.trajectory, lease.epoch) for lease in leases])
        for lease in leases:
            wanted = tokens_of(lease.trajectory, 0, len(lease.prefix))
            assert np.array_equal(lease.prefix, wanted), "a leased prefix is not what was appended"
        return leases

    def _batches(self, name: str, random: np.random.Generator) -> Any:
        """Batches of segments until no lease is left; each is sent the answer to the one before."""
        held = {lease.trajectory: (lease, len(lease.prefix)) for lease in self._leases(name)}
        while held:
            version, least, most = self._store.counts().version, *np.log(self._load.append_tokens)
            count = max(1, int(np.exp(random.uniform(least, most))) // len(held))
            batch = [self._segment(lease, offset, count, version, random) for lease, offset in held.values()]
            grants = yield batch
            for segment, grant in zip(batch, grants, strict=True):
                offset = segment.offset + len(segment.tokens)
                held[segment.trajectory] = (held[segment.trajectory][0], offset)
                if grant.stale or segment.stop is not None or offset == self._load.max_tokens:
                    del held[segment.trajectory]

    def _segment(self, lease: Lease, offset: int, count: int, version: int, random: np.random.Generator) -> Segment:
        count = min(count, self._load.max_tokens - offset)
        draw = random.random()
        return Segment(
            trajectory=lease.trajectory,
            epoch=lease.epoch,
            offset=offset,
            version=version,
            temperature=1.0,
            tokens=tokens_of(lease.trajectory, offset, count),
            logprobs=logprobs_of(lease.trajectory, offset, count),
            next_version=version,
            stop="stop" if draw < 0.2 else "budget" if draw < 0.35 else None,
        )

    def _append(self, number: str, batch: list[Segment], *, wait: bool) -> Any:
        rows = [(s.trajectory, s.epoch, s.offset, len(s.tokens), s.version, s.stop) for s in batch]
        report("appending", number, rows)
        lsn, grants = self._store.append(batch, wait=wait)
        return lsn, grants, [grant.stale for grant in grants]

    def _roll_out(self, random: np.random.Generator) -> None:
        batches, answer = self._batches("a", random), None
        with contextlib.suppress(StopIteration):
            while True:
                number = f"a{time.monotonic_ns()}"
                lsn, answer, stale = self._append(number, batches.send(answer), wait=True)
                report("appended", lsn, [(number, stale)])

    def _roll_out_pipelined(self, random: np.random.Generator) -> None:
        batches, answer, sent, lsn = self._batches("b", random), None, [], 0
        with contextlib.suppress(StopIteration):
            while True:
                number = f"b{time.monotonic_ns()}"
                lsn, answer, stale = self._append(number, batches.send(answer), wait=False)
                sent.append((number, stale))
        if sent:
            assert self._store.wait_durable(lsn, TIMEOUT_S)
            report("appended", lsn, sent)

    def _score(self, random: np.random.Generator) -> None:
        for item in self._store.unscored(8, 60.0, PATIENCE_S):
            assert np.array_equal(item.tokens, tokens_of(item.trajectory, 0, len(item.tokens)))
            outcome, reward = outcome_of(item.trajectory, item.attempt)
            report("scoring", item.trajectory, item.attempt)
            self._store.score(item.trajectory, item.attempt, outcome, reward)
            report("scored", item.trajectory, item.attempt)

    def _learn(self, random: np.random.Generator) -> None:
        store, iteration = self._store, self._committed + 1
        while True:
            version = store.counts().version
            answer = store.claim(iteration, version, PATIENCE_S)
            if answer.status != "claimed":
                continue
            assert store.wait_durable(answer.lsn, TIMEOUT_S)
            report("claimed", iteration, version, answer.groups)
            self._check_claim(iteration)
            self._publish(version + 1, iteration)
            if random.random() < 0.7:
                report("checkpoint", iteration)
                store.commit(iteration)
                report("committed", iteration)
                if random.random() < 0.5:
                    report("evicting", iteration)
                    store.evict(iteration)
                    report("evicted", iteration)
            iteration += 1

    def _check_claim(self, iteration: int) -> None:
        batch = self._store.read_claim(iteration)
        for place, trajectory in enumerate(batch.trajectories.tolist()):
            span = slice(batch.cu_seqlens[place], batch.cu_seqlens[place + 1])
            generated = (batch.mask[span] & Mask.GENERATED) != 0
            tokens = batch.tokens[span][generated]
            assert np.array_equal(tokens, tokens_of(trajectory, 0, len(tokens))), "a claim has other tokens"


def main() -> None:
    """Serve: each input line is [directory, seed, committed iteration, load, durability]."""
    for line in sys.stdin:
        directory, *order = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                report("born", os.getpid())
                Life(Path(directory), *order).run()
            except BaseException:
                fail()
            threading.Event().wait()
        os.waitpid(child, 0)
        report("dead")


if __name__ == "__main__":
    main()
