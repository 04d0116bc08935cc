"""Typed facade of the Rust trajectory store.

Every method that changes state is safe to repeat with the same ids and offsets: Ray may lose a reply. Errors are those
of the native module: `StoreError` is their root; `StaleLease`, `StoreFull`, `Conflict`, `CorruptLog` and `StoreLocked`
say what was wrong. A closed store raises `StoreError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np

from pmdflow import _rust_buffer
from pmdflow._rust_buffer import Conflict, CorruptLog, StaleLease, StoreError, StoreFull, StoreLocked
from pmdflow.types import (
    Counts,
    Float32,
    Grant,
    Int32,
    Lease,
    LeaseKind,
    Outcome,
    Prompt,
    Quota,
    Segment,
    Stop,
    TrainBatch,
    UInt8,
    Unscored,
)

__all__ = [
    "BatchBuffers",
    "ClaimAnswer",
    "Conflict",
    "CorruptLog",
    "EvalResult",
    "LateMembers",
    "StaleLease",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StoredTrajectory",
    "TrajectoryStore",
    "encode_segments",
]

GroupState = Literal["partial", "ready", "claimed", "trained", "committed"]
TrajectoryState = Literal["leased", "idle", "unscored", "scored", "failed", "late"]

PAGE_ROWS = 1024
"""Trajectories that a query reads in one call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimAnswer:
    """The answer to `TrajectoryStore.claim`."""

    status: Literal["claimed", "starved", "timeout"]
    reason: Literal["closed", "over_age"] | None
    """Why it starves: rollout is closed, or ready groups were over-age and are evicted; None unless it does."""
    groups: tuple[int, ...]
    """Group ids in claim order; empty unless claimed."""
    lsn: int
    """Record of the claim, or the newest one."""


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


_WIRE = struct.Struct("<4sHHII")
"""Magic, version, 0, length of the header, 0; `rust_buffer/src/wire.rs` describes the whole."""
_place = attrgetter("trajectory", "epoch", "offset")
_end = attrgetter("next_version", "stop", "observed")
_TOKEN, _LOGPROB = np.dtype("<i4"), np.dtype("<f4")


def encode_segments(
    segments: Sequence[Segment], *, extra: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None = None
) -> bytes:
    """Encode segments as the batch that `TrajectoryStore.append` takes.

    Args:
        segments: In the order in which they are to be appended.
        extra: Named columns of each segment, stored with it and returned by `trajectory` (for example expert ids).

    Raises:
        ValueError: `extra` has another length than `segments`, or log-probs another shape than tokens.
    """
    columns: Iterable[Mapping[str, np.ndarray[Any, Any]]] = extra if extra is not None else repeat({}, len(segments))
    rows: list[tuple[Any, ...]] = []
    arrays: list[Any] = []
    for segment, named in zip(segments, columns, strict=True):
        tokens = np.ascontiguousarray(segment.tokens, _TOKEN)
        others = [(name, np.ascontiguousarray(array)) for name, array in named.items()]
        described = [(name, array.dtype.str, array.nbytes) for name, array in others]
        temperature = float(segment.temperature)
        rows.append((*_place(segment), len(tokens), segment.version, temperature, *_end(segment), described))
        if len(tokens) == 0:
            continue
        arrays.append(tokens)
        if segment.observed:
            arrays.append(_padding(tokens.nbytes))
        else:
            if len(segment.logprobs) != len(tokens):
                raise ValueError(
                    f"trajectory {segment.trajectory}: {len(segment.logprobs)} log-probs for {len(tokens)} tokens; "
                    "give one for each"
                )
            arrays.append(np.ascontiguousarray(segment.logprobs, _LOGPROB))
        for _, array in others:
            arrays += array, _padding(array.nbytes)
    header: bytes = msgpack.packb(rows)
    return b"".join([_WIRE.pack(b"PMDB", 1, 0, len(header), 0), header, _padding(len(header)), *arrays])


def _padding(length: int) -> bytes:
    return bytes(-length % 8)


class TrajectoryStore:
    """The trajectory store with NumPy arrays and dataclasses; see `pmdflow/_rust_buffer.pyi` for the exact rules.

    Example:
        >>> store = TrajectoryStore(None, groups_per_iteration=1, lookahead=1, max_staleness=4)
        >>> store.publish(0)
        >>> store.set_quota(Quota(version=0, groups=1, tokens=100, tokens_per_segment=None))
        >>> prompt = Prompt(id="p0", text="1+1=", tokens=np.array([1, 2], dtype=np.int32))
        >>> group = store.admit("train-0", prompt, group_size=2, max_tokens=8, cursor=0)
        >>> [lease.grant for lease in store.lease("worker", version=0, max_leases=2, timeout_s=0.0)]
        [8, 8]
    """

    def __init__(
        self,
        path: Path | str | None,
        *,
        groups_per_iteration: int,
        lookahead: int,
        max_staleness: int | None,
        segment_loss: Literal["all", "current_only"] = "all",
        min_group_size: int = 2,
        straggler: tuple[int, float] | None = None,
        max_attempts: int = 3,
        lease_ttl_s: float = 30.0,
        grant_tokens: int = 64,
        durability: Literal["os", "group", "always"] = "group",
        max_bytes: int | None = None,
        file_bytes: int = 64 * 1024 * 1024,
        commit_interval_s: float = 0.005,
    ) -> None:
        """Open or create the store in directory `path`; None keeps it in memory.

        `straggler` is (members, wait in seconds): with that many members scored, a group waits for the late ones only
        so much longer; None waits for all.

        Raises:
            ValueError: a setting is out of its range.
            StoreLocked: another writer has it open.
            CorruptLog: damage before the tail of the log, or a newer format.
        """
        self._native = _rust_buffer.TrajectoryStore(
            None if path is None else str(path),
            groups_per_iteration=groups_per_iteration,
            lookahead=lookahead,
            max_staleness=max_staleness,
            segment_loss=segment_loss,
            min_group_size=min_group_size,
            straggler=straggler,
            max_attempts=max_attempts,
            lease_ttl_s=lease_ttl_s,
            grant_tokens=grant_tokens,
            durability=durability,
            max_bytes=max_bytes,
            file_bytes=file_bytes,
            commit_interval_s=commit_interval_s,
        )

    @classmethod
    def read(cls, path: Path | str) -> TrajectoryStore:
        """The store in directory `path` as it is now, beside a run that may be writing it; every change is refused.

        Raises:
            CorruptLog: as at opening.
            StoreError: there is no store.
        """
        reader = cls.__new__(cls)
        reader._native = _rust_buffer.TrajectoryStore(
            str(path), groups_per_iteration=1, lookahead=0, max_staleness=None, read_only=True
        )
        return reader

    def set_quota(self, quota: Quota) -> None:
        """Set what rollout may do under `quota.version`; a later call for the same version replaces it."""
        self._native.set_quota(quota.version, quota.groups, quota.tokens, quota.tokens_per_segment)

    def admit(
        self,
        request_id: str,
        prompt: Prompt,
        *,
        group_size: int,
        max_tokens: int,
        cursor: int | None = None,
        kind: LeaseKind = "train",
        priority: int = 0,
        wait: bool = True,
    ) -> int:
        """Admit a prompt with `group_size` empty trajectories; returns the group id.

        Groups of higher `priority` are started first; what is started is continued first, whatever its priority.
        Without `wait` it answers before the admission is durable; `wait_durable` awaits that.

        Raises:
            StoreFull: the quota of groups or `max_bytes` is reached.
            Conflict: the id was admitted with other content, or its group is gone.
        """
        return self._native.admit(
            request_id,
            cursor=cursor,
            kind=kind,
            prompt_id=prompt.id,
            prompt=np.asarray(prompt.tokens, dtype="<i4").tobytes(),
            metadata=msgpack.packb(dict(prompt.metadata), use_bin_type=True),
            group_size=group_size,
            max_tokens=max_tokens,
            priority=priority,
            wait=wait,
        )

    def lease(
        self, worker: str, version: int, max_leases: int, timeout_s: float, *, now_s: float | None = None
    ) -> list[Lease]:
        """Lease up to `max_leases` trajectories to a worker whose engine holds `version`; waits for the first one."""
        rows = self._native.lease(worker, version, max_leases, timeout_s, now_s)
        return [
            Lease(
                **row
                | {
                    "metadata": msgpack.unpackb(row["metadata"]),
                    "prompt": _int32(row["prompt"]),
                    "prefix": _int32(row["prefix"]),
                    "prefix_observed": np.frombuffer(row["prefix_observed"], np.uint8),
                }
            )
            for row in rows
        ]

    def fence(self, worker: str) -> int:
        """End every lease of a worker that is dead or given up, and lease nothing to it again; returns how many.

        What it appends from now on is stale. A worker that takes over needs a name of its own.
        """
        return self._native.fence(worker)

    def append(
        self, batch: bytes | Sequence[Segment], *, wait: bool = True, now_s: float | None = None
    ) -> tuple[int, list[Grant]]:
        """Append segments (encoded or not), extend grants, end leases; returns the log position and a grant for each.

        Without `wait` it answers before the segments are durable; `wait_durable` with the log position awaits that.

        Raises:
            Conflict: a gap, other content at the same offset, more than `max_tokens`, or a decreasing version.
        """
        encoded = batch if isinstance(batch, bytes) else encode_segments(batch)
        lsn, replies = self._native.append(encoded, wait, now_s)
        return lsn, [Grant(trajectory=trajectory, stale=stale, tokens=grant) for trajectory, stale, grant in replies]

    def unscored(self, max_items: int, ttl_s: float, timeout_s: float, *, now_s: float | None = None) -> list[Unscored]:
        """Complete trajectories without a reward; each is handed out again only after `ttl_s` or a restart."""
        rows = self._native.unscored(max_items, ttl_s, timeout_s, now_s)
        return [
            Unscored(
                **row
                | {
                    "metadata": msgpack.unpackb(row["metadata"]),
                    "prompt": _int32(row["prompt"]),
                    "tokens": _int32(row["tokens"]),
                    "observed": np.frombuffer(row["observed"], np.uint8),
                    "stop": Stop(row["stop"]),
                }
            )
            for row in rows
        ]

    def score(
        self,
        trajectory: int,
        attempt: int,
        outcome: Outcome,
        reward: float = 0.0,
        components: Mapping[str, float] | None = None,
        *,
        wait: bool = True,
        now_s: float | None = None,
    ) -> None:
        """Record the outcome of scoring attempt `attempt`; of a late member it is ignored.

        Without `wait` it answers before that is durable.

        Raises:
            Conflict: not complete, a reward that is not finite, or another outcome for an attempt already recorded.
        """
        self._native.score(trajectory, attempt, outcome, reward, dict(components or {}), wait, now_s)

    def publish(
        self, version: int, iteration: int | None = None, left_out: Mapping[str, Iterable[int]] | None = None
    ) -> None:
        """Make `version` the newest; `iteration`'s claim is trained.

        `left_out` names the trajectories that had no gradient by `filter` and `veto`: the ledger and `read_claim` show
        their tokens as masked by `Mask.FILTER` or `Mask.VETO`, where the claim left them to the learner.

        Raises:
            Conflict: the version is not above every earlier one, the claim is not there to be trained, or what is left
                out is not in it.
        """
        self._native.publish(version, iteration, {reason: list(ids) for reason, ids in (left_out or {}).items()})

    def claim(self, iteration: int, version: int, timeout_s: float, *, now_s: float | None = None) -> ClaimAnswer:
        """Claim `iteration`'s groups for a learner at `version`, waiting until they are ready or rollout is closed.

        Raises:
            Conflict: another claim is untrained, or the iteration is not above every earlier one.
        """
        row = self._native.claim(iteration, version, timeout_s, now_s)
        return ClaimAnswer(**row | {"groups": tuple(row["groups"])})

    def read_claim(self, iteration: int, *, out: BatchBuffers | None = None, check: bool = True) -> TrainBatch:
        """The groups of a claim, packed; members whose scoring failed for good are left out.

        Args:
            iteration: Of the claim.
            out: Filled and referred to by the answer; nobody else may touch them during the call.
            check: Test the checksum of every token array.

        Raises:
            Conflict: the iteration has no claim, or `out` is too small for it.
            CorruptLog: bytes of it are not those that were written; names file and offset.
        """
        buffers = BatchBuffers.allocate(self._native.claim_tokens(iteration)) if out is None else out
        names = [field.name for field in fields(BatchBuffers)]
        views = {name: getattr(buffers, name).view(np.uint8) for name in names}
        row = self._native.read_claim(iteration, **views, check=check)
        arrays = {name: np.frombuffer(row.pop(name), dtype=dtype) for name, dtype in _ROW_DTYPES.items()}
        arrays |= {name: getattr(buffers, name)[: arrays["cu_seqlens"][-1]] for name in names}
        components = {name: np.frombuffer(data, dtype="<f8") for name, data in row.pop("components").items()}
        return TrainBatch(**row | arrays | {"components": components, "prompt_ids": tuple(row["prompt_ids"])})

    def commit(self, iteration: int) -> None:
        """A durable checkpoint covers every claim up to `iteration`.

        Raises:
            Conflict: one of them is not trained.
        """
        self._native.commit(iteration)

    def uncommit(self, iteration: int) -> list[int]:
        """Undo every claim after `iteration`: their groups are ready again. Returns the undone iterations.

        Raises:
            Conflict: one of them is evicted.
        """
        return self._native.uncommit(iteration)

    def evict(self, iteration: int) -> int:
        """Drop the groups of every committed claim up to `iteration`, and log files without live groups."""
        return self._native.evict(iteration)

    def eval_results(self, prefix: str, timeout_s: float) -> list[EvalResult] | None:
        """Results of the evaluation groups whose request ids start with `prefix`; None if some are missing in time."""
        rows = self._native.eval_results(prefix, timeout_s)
        return None if rows is None else [EvalResult(**row | {"stop": Stop(row["stop"])}) for row in rows]

    def drop_eval(self, prefix: str) -> int:
        """Evict the evaluation groups whose request ids start with `prefix`; returns how many."""
        return self._native.drop_eval(prefix)

    def groups(self, state: GroupState | None = None) -> list[dict[str, Any]]:
        """Live groups with their prompts' metadata.

        Keys: group, request_id, prompt_id, kind, state, iteration, trajectories, cursor, priority, max_tokens,
        prompt_length, tokens (those of late members excepted), metadata; and scored, failed, late: how many members.
        """
        rows = self._native.groups(state)
        return [row | {"metadata": msgpack.unpackb(row["metadata"])} for row in rows]

    def query(
        self,
        *,
        iteration: int | None = None,
        version: tuple[int | None, int | None] = (None, None),
        reward: tuple[float | None, float | None] = (None, None),
        length: tuple[int | None, int | None] = (None, None),
        stop: Stop | None = None,
        prompt_id: str | None = None,
        group: int | None = None,
        kind: LeaseKind | None = None,
        state: TrajectoryState | GroupState | None = None,
    ) -> Iterator[StoredTrajectory]:
        """Live trajectories in the order of their ids, read lazily: each page shows the store as it is then.

        Args:
            iteration: The one that claimed them.
            version: Inclusive bounds, None for open; some token is of a version within them.
            reward: Likewise; selects only trajectories with a reward if one is set.
            length: Likewise, of the number of generated tokens.
            stop: Why it ended; `Stop.NONE` selects those that did not.
            prompt_id: Its prompt's.
            group: Its group's.
            kind: Training or evaluation.
            state: Its own or its group's.

        Raises:
            ValueError: an unknown `kind` or `state`.
        """
        after: int | None = None
        while True:
            page, after = self._native.select(
                after,
                PAGE_ROWS,
                iteration=iteration,
                version=version,
                reward=reward,
                length=length,
                stop=stop,
                prompt_id=prompt_id,
                group=group,
                kind=kind,
                state=state,
            )
            for row in page:
                yield StoredTrajectory(**row | {"stop": Stop(row["stop"])})
            if after is None:
                return

    def claims(self) -> dict[int, str]:
        """State of every claim that is not evicted: `claimed`, `trained` or `committed`."""
        return self._native.claims()

    def take_late(self) -> list[LateMembers]:
        """Groups that became ready without late members since the last call."""
        return [LateMembers(**row) for row in self._native.take_late()]

    def trajectory(self, trajectory: int) -> dict[str, Any]:
        """One live trajectory with its arrays.

        Keys: trajectory, group, state (a `TrajectoryState`), prompt int32 [P], tokens int32 [S], logprobs float32 [S],
        observed uint8 [S], segments [(length, version, temperature, observed)], reward, components, stop, attempts,
        epoch, extra {name: [(offset, length, values)]}.

        Raises:
            Conflict: it is not in the store.
        """
        row = self._native.trajectory(trajectory)
        extra = {
            name: [(offset, length, np.frombuffer(data, dtype=dtype)) for offset, length, dtype, data in runs]
            for name, runs in row["extra"].items()
        }
        arrays = {
            "prompt": _int32(row["prompt"]),
            "tokens": _int32(row["tokens"]),
            "logprobs": np.frombuffer(row["logprobs"], dtype="<f4"),
            "observed": np.frombuffer(row["observed"], np.uint8),
        }
        return row | arrays | {"stop": Stop(row["stop"]), "extra": extra}

    def counts(self) -> Counts:
        """Live numbers."""
        return Counts(**self._native.counts())

    def ledger(self) -> dict[str, int]:
        """Durable generated training tokens, each in one place; `generated` is their sum.

        Outside the sum: `prompt` (prompt tokens, once for each trajectory), `reprefill` and `eval`.
        """
        return self._native.ledger()

    def versions_spent(self) -> dict[int, int]:
        """Durable training tokens by policy version, for the versions that still have a quota."""
        return self._native.versions_spent()

    def wait_durable(self, lsn: int | None, timeout_s: float) -> bool:
        """Wait until every record up to `lsn` (None: the newest one) is on disk; False when it is not in time."""
        return self._native.wait_durable(lsn, timeout_s)

    def close(self) -> None:
        """Sync, wake every waiter with `StoreError` and release the lock. Safe to repeat."""
        self._native.close()


_ROW_DTYPES = {
    "cu_seqlens": "<i8",
    "prompt_lengths": "<i4",
    "groups": "<i8",
    "trajectories": "<i8",
    "rewards": "<f8",
    "stops": "|u1",
}


def _int32(data: bytes) -> Int32:
    return np.frombuffer(data, dtype="<i4")
