"""What the store answers: values that only its callers see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pmdflow.types import Float32, Float64, Int32, LeaseKind, Stop, UInt8

GroupState = Literal["partial", "ready", "claimed", "trained", "committed"]
TrajectoryState = Literal["leased", "idle", "unscored", "scored", "failed", "late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimAnswer:
    """The answer to `TrajectoryStore.claim`."""

    status: Literal["claimed", "starved", "timeout"]
    reason: Literal["closed", "over_age", "no_signal"] | None
    """Why it starves: rollout is closed, or groups were evicted as over-age or without a signal; None unless
    it does."""
    groups: tuple[int, ...]
    """Group ids in claim order; empty unless claimed."""
    lsn: int
    """Record of the claim, or the newest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """The answer to `TrajectoryStore.fork`."""

    stale: bool
    """The lease was fenced: nothing was written, drop the sequence."""
    branch: int
    """Id of the new branch: a trajectory of its own in claims and in the archive."""
    epoch: int
    """Of the next appends, which still name the leased trajectory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Successes:
    """How well prompts are answered, by the key that their admissions name.

    A claim moves the rates of its groups, and of those that were evicted without a signal since the last one; a claim
    that is made again does not.
    """

    number: int
    """Of these rates: the iteration of the claim that moved them last, or one more than before where an iteration is
    claimed anew; 0 before the first."""
    keys: npt.NDArray[np.uint64]
    """What has moved, shape [K]."""
    rates: Float64
    """Moving averages of the share of successes in a group, 0 to 1, shape [K]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Result of one evaluation trajectory."""

    request_id: str
    prompt_id: str
    reward: float | None
    """None when scoring failed for good."""
    length: int
    """Generated tokens."""
    stop: Stop
    first_version: int | None
    """Policy version of the first token; None when empty."""
    last_version: int | None
    """Policy version of the last token; None when empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LateMembers:
    """A group that became ready without its late members (the straggler rule)."""

    group: int
    prompt_id: str
    members: int
    """Late ones."""
    tokens: int
    """Their generated tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTrajectory:
    """What a query tells of one trajectory; `TrajectoryStore.trajectory` has its arrays."""

    trajectory: int
    group: int
    prompt_id: str
    kind: LeaseKind
    state: TrajectoryState
    group_state: GroupState
    iteration: int | None
    """Iteration that claimed its group."""
    reward: float | None
    """None without a reward."""
    length: int
    """Generated tokens."""
    stop: Stop
    first_version: int | None
    """Policy version of the first token; None when empty."""
    last_version: int | None
    """Policy version of the last token; None when empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBuffers:
    """Arrays that `TrajectoryStore.read_claim` fills, to be used again.

    The first touch of new memory costs more than the copy itself. What was read stays valid until the next read into
    the same buffers.

    Example:
        >>> buffers = BatchBuffers.allocate(1 << 20)
        >>> batch = store.read_claim(iteration, out=buffers)
    """

    tokens: Int32
    """All have one capacity, shape [C]."""
    logprobs: Float32
    versions: Int32
    temperatures: Float32
    mask: UInt8

    @classmethod
    def allocate(cls, num_tokens: int) -> BatchBuffers:
        """Buffers for claims of up to `num_tokens` tokens."""
        return cls(
            tokens=np.empty(num_tokens, np.int32),
            logprobs=np.empty(num_tokens, np.float32),
            versions=np.empty(num_tokens, np.int32),
            temperatures=np.empty(num_tokens, np.float32),
            mask=np.empty(num_tokens, np.uint8),
        )
