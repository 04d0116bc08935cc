"""The workload of `bench/store.py`: ragged trajectories in groups of 8, in the order in which they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

GROUP_SIZE = 8
BATCH = 64
"""Trajectories of one append."""
BATCH_GROUPS = 64
"""Groups of one packed batch."""
IN_FLIGHT = 128
"""Groups whose trajectories arrive interleaved."""
NUM_VERSIONS = 4
BYTES_PER_TOKEN = 12
"""int32 token, float32 log-prob, int32 version."""

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Complete groups, packed."""

    members: npt.NDArray[np.int64]
    """Which trajectories of the workload, in the order of the batch [N]."""
    tokens: Int32
    """[T]"""
    logprobs: Float32
    """[T]"""
    versions: Int32
    """[T]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Out:
    """Reused output arrays, large enough for any batch."""

    tokens: Int32
    logprobs: Float32
    versions: Int32


class Workload:
    """Trajectories 0 .. size - 1; members of group g are 8 g .. 8 g + 7."""

    def __init__(
        self, size: int, *, mean_tokens: float = 1000.0, low: int = 16, high: int = 8192, seed: int = 0
    ) -> None:
        """Lengths are lognormal with sigma 0.8, clipped; tokens Zipf-like, log-probs exponential."""
        rng = np.random.default_rng(seed)
        self.size = size - size % GROUP_SIZE
        self.num_groups = self.size // GROUP_SIZE
        sigma = 0.8
        drawn = rng.lognormal(np.log(mean_tokens) - sigma**2 / 2, sigma, self.size)
        self.lengths: Int32 = np.clip(drawn, low, high).astype(np.int32)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        total = int(self.starts[-1])
        self._tokens = np.minimum(rng.zipf(1.3, total), 150_000).astype(np.int32)
        self._logprobs = -rng.exponential(1.0, total).astype(np.float32)
        self.version_of = rng.integers(0, NUM_VERSIONS, self.size).astype(np.int32)
        self._versions = np.repeat(self.version_of, self.lengths)
        self.payload_bytes = total * BYTES_PER_TOKEN
        self.arrivals = self._arrivals(rng)

    def _arrivals(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Every trajectory once; the next arrival comes from one of `IN_FLIGHT` unfinished groups at random."""
        waiting = iter(range(self.num_groups))
        open_groups = [(group, 0) for group in islice(waiting, IN_FLIGHT)]
        arrivals = np.empty(self.size, dtype=np.int64)
        for number in range(self.size):
            slot = int(rng.integers(len(open_groups)))
            group, member = open_groups[slot]
            arrivals[number] = group * GROUP_SIZE + member
            if member + 1 < GROUP_SIZE:
                open_groups[slot] = (group, member + 1)
            elif (new := next(waiting, None)) is not None:
                open_groups[slot] = (new, 0)
            else:
                open_groups.pop(slot)
        return arrivals

    def append_batches(self) -> Iterator[list[int]]:
        """Trajectories in the order of arrival, `BATCH` at a time."""
        for start in range(0, self.size, BATCH):
            yield self.arrivals[start : start + BATCH].tolist()

    def group_batches(self) -> Iterator[list[int]]:
        """Groups in the order of completion, `BATCH_GROUPS` at a time; an incomplete last batch is left out."""
        last = np.empty(self.size, dtype=np.int64)
        last[self.arrivals] = np.arange(self.size)
        order = np.argsort(last.reshape(self.num_groups, GROUP_SIZE).max(axis=1), kind="stable")
        for start in range(0, self.num_groups - BATCH_GROUPS + 1, BATCH_GROUPS):
            yield order[start : start + BATCH_GROUPS].tolist()

    def tokens(self, member: int) -> Int32:
        return self._tokens[self.starts[member] : self.starts[member + 1]]

    def logprobs(self, member: int) -> Float32:
        return self._logprobs[self.starts[member] : self.starts[member + 1]]

    def versions(self, member: int) -> Int32:
        return self._versions[self.starts[member] : self.starts[member + 1]]

    def check(self, batch: Batch) -> None:
        """Compare a batch with the truth, bit for bit."""
        members = batch.members.tolist()
        for name, truth in (("tokens", self.tokens), ("logprobs", self.logprobs), ("versions", self.versions)):
            wanted = np.concatenate([truth(member) for member in members])
            if wanted.tobytes() != getattr(batch, name).tobytes():
                raise AssertionError(f"{name} of a batch differ from what was appended")

    def out(self) -> Out:
        """Reused arrays for the largest batch, their pages touched."""
        most = max(int(self.lengths[members_of(groups)].sum()) for groups in self.group_batches())
        room = most + 64 * BATCH_GROUPS * GROUP_SIZE
        return Out(tokens=np.ones(room, np.int32), logprobs=np.ones(room, np.float32), versions=np.ones(room, np.int32))


def members_of(groups: Sequence[int]) -> npt.NDArray[np.int64]:
    """Trajectories of `groups`, group after group."""
    return (np.asarray(groups, dtype=np.int64)[:, None] * GROUP_SIZE + np.arange(GROUP_SIZE)).ravel()
