"""The values that cross component boundaries.

Shapes: T tokens of a batch, N trajectories, G groups. Arrays are NumPy; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum, IntFlag
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]

LeaseKind = Literal["train", "eval"]
Outcome = Literal["scored", "invalid", "infra_failure"]
StopReason = Literal["stop", "length", "repetition", "budget", "abort"]


class Stop(IntEnum):
    """Why a trajectory ended, as stored; `NONE` while it is partial."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    REPETITION = 3


class Mask(IntFlag):
    """Per-token flags of a claim; a generated token is trained if `TRAINED` is set, else another says why not."""

    GENERATED = 1
    TRAINED = 2
    OVER_AGE = 4
    SEGMENT = 8
    FILTER = 16
    VETO = 32
    TRAINABLE = TRAINED | FILTER | VETO
    """What the claim left to the learner, which left out the filtered and vetoed itself and may decide anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What decided which prompt was drawn, where that depends on how well earlier ones were answered."""

    key: int
    """What its success is kept by, 0 to 2^64 - 1."""
    number: int
    """Of the rates of success that it was drawn by; see `Successes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A task text and what its verifier needs."""

    id: str
    text: str
    tokens: Int32
    """Prompt token ids, shape [P]."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    drawn: Drawn | None = None  # None: its success is not kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The exclusive right to extend one trajectory, until it expires or is fenced by a newer epoch."""

    trajectory: int
    group: int
    epoch: int
    kind: LeaseKind
    metadata: Mapping[str, Any]
    """The prompt's."""
    text: str | None
    """The prompt's. None: recorded before texts were kept."""
    prompt: Int32  # [P]
    prefix: Int32
    """Durable token ids after the prompt so far, shape [S]; the next append has offset S."""
    prefix_observed: UInt8
    """1 where the environment made the token, shape [S]."""
    max_tokens: int
    """Tokens after the prompt that the whole trajectory may reach, prefix included."""
    grant: int
    """Tokens that may be generated now, under the policy version the lease was asked for."""


@dataclass(slots=True, kw_only=True)
class Segment:
    """New tokens of one leased trajectory under one policy version; to freeze it would take 5 % of an append's time."""

    trajectory: int
    epoch: int
    offset: int
    """Number of tokens after the prompt before these."""
    version: int
    temperature: float
    tokens: Int32
    logprobs: Float32
    """Log-probs of logits / temperature, same shape as `tokens`."""
    next_version: int
    """The version that the next tokens will be generated under; the returned grant is for it."""
    stop: StopReason | None = None
    """None keeps the lease; anything else ends it."""
    observed: bool = False
    """The environment made the tokens: they count in offsets and `max_tokens` only, and `logprobs` is ignored."""
    columns: Mapping[str, npt.ArrayLike] | None = None  # extra ones of the engine, a value of any shape a token


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The answer to one appended segment."""

    trajectory: int
    stale: bool
    """The lease was fenced: nothing was written, drop the sequence."""
    tokens: int
    """Tokens that may be generated beyond those appended, under `next_version`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unscored:
    """A complete trajectory that awaits its reward."""

    trajectory: int
    group: int
    kind: LeaseKind
    attempt: int
    prompt_id: str
    metadata: Mapping[str, Any]
    text: str | None
    """The prompt's. None: recorded before texts were kept."""
    prompt: Int32
    tokens: Int32
    observed: UInt8
    """1 where the environment made the token; shape of `tokens`."""
    stop: Stop
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Sums, by name, of what its environment or program said of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What rollout may do under one policy version, as decided by the scheduler."""

    version: int
    groups: int
    """Most groups that may be admitted and not yet trained, partial ones counted."""
    tokens: int
    """Most tokens that are granted under `version`; what workers append beyond their grants is taken and counted."""
    tokens_per_segment: int | None
    """Most tokens that one trajectory may generate under `version`; None is unlimited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Live numbers of the store; the scheduler's input and the live view's."""

    version: int
    """Newest published policy version."""
    max_version: int
    """Newest version the store has ever seen; numbers are never reused."""
    next_cursor: int
    lsn: int
    durable_lsn: int
    groups_untrained: int
    """Admitted and not yet trained: partial, complete, ready or claimed."""
    oldest_untrained: int | None  # of them, by its group id
    groups_ready: int
    groups_claimed: int
    claims_undone: int  # trained again before any new one is made
    trajectories_leased: int
    trajectories_idle: int  # neither leased nor complete: never started, or partial
    trajectories_partial: int
    """Idle ones that hold at least one token."""
    trajectories_unscored: int
    trajectories_late: int
    """Evicted since the store began because their groups did not wait for them (the straggler rule)."""
    groups_no_signal: int  # evicted since the store was opened because their rewards said nothing to the learner
    scores_ignored: int
    """Second, differing outcomes of scoring attempts since the store was opened: the first ones stand."""
    eval_pending: int  # evaluation trajectories that are not scored yet
    tokens_budget: int  # of the newest version
    tokens_spent: int  # durable, generated under it
    bytes: int  # of the log files on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimPlan:
    """Which optimizer step trains each group of a claim. It is recorded with the claim: no later rule re-derives it."""

    steps: Int32
    """0-based step of each group, in claim order [G]."""
    num_steps: int
    """Steps of the iteration; one without a group is skipped."""
    rule: str
    """Name of the rule that dealt the groups."""
    seed: int | None
    """Of the rule's random numbers; None if it draws none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """Which trajectories of a claim are branches of one episode: forks of a history that an agent rewrote.

    The tokens that a branch keeps of its parent are in it too, with mask 0 as observed ones are: they are trained where
    they were generated. Reward, components and stop are the episode's.
    """

    episodes: Int64
    """Episode of each trajectory [N], by its first branch; those of an episode are adjacent, in the order of forks."""
    parents: Int64
    """Trajectory that each was forked from [N]; -1 for the first of an episode."""
    fork_offsets: Int32
    """Tokens after the prompt that each keeps of its parent [N]; 0 for the first of an episode."""


TurnRow = tuple[int, int, Mapping[str, float], str | None]
"""Index of a trajectory, its tokens after the prompt before the note, rewards by name, and key of its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRows:
    """What is known of each trajectory of a claim; groups are contiguous, in claim order."""

    iteration: int
    version: int
    """Learner version at the claim."""
    cu_seqlens: Int64
    """Where each trajectory begins among the tokens of all, its prompt first, and the end [N + 1]."""
    prompt_lengths: Int32
    """[N]"""
    groups: Int64
    """Group id of each trajectory [N]; members of a group are adjacent."""
    trajectories: Int64
    """[N]"""
    rewards: Float64
    """[N]"""
    components: Mapping[str, Float64]
    """Reward components by name, each [N]; NaN where a member has none of that name."""
    stops: UInt8
    """`Stop` of each trajectory [N]."""
    prompt_ids: tuple[str, ...]
    """Prompt id of each trajectory [N]."""
    plan: ClaimPlan | None = None
    """None: recorded before plans were, or made up; then the learner deals the groups in claim order."""
    branches: Branches | None = None
    """None: each trajectory is an episode of its own."""
    restored: Mapping[int, int] = field(default_factory=dict)  # version of each resume: iterations its weights trained
    turns: Sequence[TurnRow] = ()  # what was said of episodes, in the order of their rows

    def group_starts(self) -> Int64:
        """Index of the first trajectory of each group, in claim order [G]."""
        return np.flatnonzero(np.diff(self.groups, prepend=-1))

    def first_branches(self) -> Int64:
        """Index of the first trajectory of each episode [E]."""
        count = len(self.trajectories)
        return np.arange(count) if self.branches is None else np.flatnonzero(self.branches.parents < 0)

    def episode_of(self) -> Int64:
        """Index of the episode of each trajectory [N]: its place among the episodes of the claim."""
        count = len(self.trajectories)
        return np.arange(count) if self.branches is None else np.cumsum(self.branches.parents < 0) - 1

    def episode_shares(self) -> Float64:
        """What each trajectory counts for [N]: 1 / branches of its episode."""
        return np.asarray(1.0 / np.bincount(self.episode_of())[self.episode_of()])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch(ClaimRows):
    """One claim, packed: prompt and generated tokens, trajectory after trajectory."""

    tokens: Int32
    """[T]"""
    logprobs: Float32
    """Behavior log-probs [T]; 0 at prompt tokens."""
    versions: Int32
    """Policy version of each token [T]; -1 at prompt tokens."""
    temperatures: Float32
    """Sampling temperature of each token [T]; 1 at prompt tokens."""
    mask: UInt8
    """`Mask` flags [T]; 0 at prompt tokens."""
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Extra columns of tokens by name, each [T, ...]; NaN, or 0 in whole numbers, where a token has none."""
    trajectory_extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Extra values of trajectories by name, each [N, ...]; likewise."""

    def count(self, flags: Mask) -> Int64:
        """Tokens of each trajectory with one of `flags` [N]."""
        running = np.concatenate([[0], np.cumsum((self.mask & flags) != 0, dtype=np.int64)])
        return np.asarray(running[self.cu_seqlens[1:]] - running[self.cu_seqlens[:-1]])

    def segment_starts(self) -> Int64:
        """First token of every segment: where trajectory, version, temperature or mask changes [S]."""
        total = len(self.tokens)
        if total == 0:
            return np.empty(0, np.int64)
        first = np.zeros(total, np.bool_)
        first[self.cu_seqlens[:-1][np.diff(self.cu_seqlens) > 0]] = True
        bits = self.temperatures.view(np.uint32)  # so that any value round-trips
        for column in (self.versions, bits, self.mask):
            first[1:] |= column[1:] != column[:-1]
        return np.flatnonzero(first).astype(np.int64)

    def read(self, rows: Int64) -> ClaimTokens:
        """The tokens of the trajectories at `rows`, packed in that order."""
        parts = [slice(*self.cu_seqlens[row : row + 2]) for row in rows]
        return ClaimTokens(
            tokens=np.concatenate([np.empty(0, np.int32), *(self.tokens[part] for part in parts)]),
            logprobs=np.concatenate([np.empty(0, np.float32), *(self.logprobs[part] for part in parts)]),
            extra={name: np.concatenate([own[:0], *(own[part] for part in parts)]) for name, own in self.extra.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimTokens:
    """The tokens of trajectories of a claim, packed, 8 bytes each; all else of a token is in its segment."""

    tokens: Int32
    """[T]"""
    logprobs: Float32
    """Behavior log-probs [T]; 0 at prompt tokens."""
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Extra columns of tokens by name, each [T, ...], as far as they were asked for; see `TrainBatch.extra`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(ClaimRows):
    """One claim without its tokens: its rows, and the S segments of which these consist.

    A segment is a maximal run of tokens of a trajectory with equal version, temperature and mask; the prompt is one.
    """

    segment_offsets: Int64
    """First segment of each trajectory, and the end [N + 1]."""
    segment_lengths: Int64
    """Tokens [S]."""
    segment_versions: Int32
    """[S]; -1 at prompts and observed tokens."""
    segment_temperatures: Float32
    """[S]; 1 at prompts."""
    segment_masks: UInt8
    """`Mask` flags [S]; 0 at prompts and observed tokens."""

    @classmethod
    def of(cls, batch: TrainBatch) -> Claim:
        """The claim whose tokens `batch` has."""
        starts = batch.segment_starts()
        return cls(
            **{field.name: getattr(batch, field.name) for field in fields(ClaimRows)},
            segment_offsets=np.searchsorted(starts, batch.cu_seqlens),
            segment_lengths=np.diff(np.append(starts, len(batch.tokens))),
            segment_versions=batch.versions[starts],
            segment_temperatures=batch.temperatures[starts],
            segment_masks=batch.mask[starts],
        )

    @property
    def segment_owners(self) -> Int64:
        """The trajectory of each segment [S], by its index."""
        return np.repeat(np.arange(len(self.rewards)), np.diff(self.segment_offsets))

    def count(self, flags: Mask) -> Int64:
        """Tokens of each trajectory with one of `flags` [N]."""
        chosen = np.where(self.segment_masks & flags, self.segment_lengths, 0)
        running = np.concatenate([[0], np.cumsum(chosen, dtype=np.int64)])
        return np.asarray(running[self.segment_offsets[1:]] - running[self.segment_offsets[:-1]])

    def batch(self, rows: Int64, own: ClaimTokens) -> TrainBatch:
        """The trajectories at `rows` with their tokens, as a batch of their own; without components and plan."""
        counts = np.diff(self.segment_offsets)[rows]
        skipped = np.cumsum(counts) - counts
        chosen = np.arange(counts.sum()) + np.repeat(self.segment_offsets[rows] - skipped, counts)
        lengths = self.segment_lengths[chosen]
        return TrainBatch(
            iteration=self.iteration,
            version=self.version,
            cu_seqlens=np.concatenate([[0], np.cumsum(np.diff(self.cu_seqlens)[rows])]).astype(np.int64),
            prompt_lengths=self.prompt_lengths[rows],
            groups=self.groups[rows],
            trajectories=self.trajectories[rows],
            rewards=self.rewards[rows],
            components={},
            stops=self.stops[rows],
            prompt_ids=tuple(self.prompt_ids[row] for row in rows),
            tokens=own.tokens,
            logprobs=own.logprobs,
            versions=np.repeat(self.segment_versions[chosen], lengths),
            temperatures=np.repeat(self.segment_temperatures[chosen], lengths),
            mask=np.repeat(self.segment_masks[chosen], lengths),
            extra=own.extra,
        )
