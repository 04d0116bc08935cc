"""Typed facade of the Rust trajectory store.

Every method that changes state is safe to repeat with the same ids and offsets: Ray may lose a reply. Errors are those
of the native module, `StoreError` their root: `Conflict` where another call was first or this one cannot be meant,
`StoreFull` where there is no room, `DiskFault` where the operating system fails, `StorePoisoned` after that,
`CorruptLog` where bytes are not those that were written, `StoreLocked`. A closed store raises `StoreError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack
from uuid import uuid4

import numpy as np
from numpy.typing import ArrayLike

from pmdflow import _rust_buffer
from pmdflow.store.alone import attempts_of, put_attempts, sampled_at
from pmdflow.store.annotations import Annotations
from pmdflow.store.answers import ClaimAnswer, LateMembers
from pmdflow.store.columns import Columns
from pmdflow.store.episodes import Episodes, rewards_said
from pmdflow.store.metadata import pack_metadata, unpack_metadata
from pmdflow.store.segments import encode_segments
from pmdflow.store.settings import StoreSettings
from pmdflow.store.tokens import token_ids
from pmdflow.store.view import StoreView, int32
from pmdflow.types import ClaimPlan, Grant, Lease, LeaseKind, Outcome, Prompt, Quota, Segment, Stop, UInt8, Unscored


class TrajectoryStore(Annotations, Episodes, StoreView):
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

    _read_from: Path | str | None = None
    """The directory of one that only reads."""

    def __init__(self, path: Path | str | None, **settings: Unpack[StoreSettings]) -> None:
        """Open or create the store in directory `path`; None keeps it in memory.

        Raises:
            ValueError: a setting is out of its range.
            StoreLocked: another writer has it open.
            CorruptLog: damage before the tail of the log, or a newer format.
        """
        given: dict[str, Any] = {**settings, "scorers": list(settings.get("scorers", ()))}
        self._native = _rust_buffer.TrajectoryStore(None if path is None else str(path), **given)

    @classmethod
    def read(cls, path: Path | str) -> TrajectoryStore:
        """The store in directory `path` as it is now, beside a run that may be writing it; every change is refused.

        Raises:
            CorruptLog: as at opening.
            DiskFault: there is no store.
        """
        reader = cls.__new__(cls)
        reader._read_from = path
        reader._native = _rust_buffer.TrajectoryStore(
            str(path), groups_per_iteration=1, lookahead=0, max_staleness=None, read_only=True
        )
        return reader

    def refresh(self) -> None:
        """Show what the store in the directory is now; for one that `read` opened.

        Raises:
            ValueError: it was not: what may write it is always up to date.
            StoreError: as `read`; what was shown before still is.
        """
        if self._read_from is None:
            raise ValueError("only a store opened by `read` is refreshed; one that may be written always shows what is")
        newer = type(self).read(self._read_from)
        self._native.close()
        self._native = newer._native

    def __enter__(self) -> Self:
        """Itself; the end of the context closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Sync and let go of the directory."""
        self.close()

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
            ValueError: a token id is outside int32, or the metadata cannot be stored.
        """
        return self._native.admit(
            request_id,
            cursor=cursor,
            kind=kind,
            prompt_id=prompt.id,
            prompt=token_ids(prompt.tokens, of=f"prompt {prompt.id!r}").tobytes(),
            metadata=pack_metadata(prompt),
            text=prompt.text,
            group_size=group_size,
            max_tokens=max_tokens,
            priority=priority,
            drawn=None if prompt.drawn is None else (prompt.drawn.key, prompt.drawn.number),
            wait=wait,
        )

    def lease(
        self,
        worker: str,
        version: int,
        max_leases: int,
        timeout_s: float,
        *,
        now_s: float | None = None,
        kind: Literal["train", "eval"] | None = None,
    ) -> list[Lease]:
        """Lease up to `max_leases` trajectories to a worker whose engine holds `version`; waits for the first one.

        With `kind` only such ones. An evaluation that is asked for alone is of one version: what another has begun is
        not leased.
        """
        return [_lease(row) for row in self._native.lease(worker, version, max_leases, timeout_s, now_s, kind)]

    def lease_group(self, worker: str, group: int) -> list[Lease]:
        """Lease the members of a group that can still grow, outside every order and budget: they are generated already.

        Raises:
            Conflict: there is no such group.
        """
        return [_lease(row) for row in self._native.lease_group(worker, group)]

    def fence(self, worker: str) -> int:
        """End every lease of a worker that is dead or given up, and lease nothing to it again; returns how many.

        What it appends from now on is stale. A worker that takes over needs a name of its own.
        """
        return self._native.fence(worker)

    def set_oldest(self, version: int) -> None:
        """With `one_version`: weights below this version are lost; what those began goes on under the newest one.

        It is never lowered, and forgotten at opening, like leases.
        """
        self._native.set_oldest(version)

    def wait_drained(self, version: int, timeout_s: float) -> bool:
        """Wait until no trajectory of an older version is in flight; False when there is one after `timeout_s`."""
        return self._native.wait_drained(version, timeout_s)

    def append(
        self, batch: bytes | memoryview | UInt8 | Sequence[Segment], *, wait: bool = True, now_s: float | None = None
    ) -> tuple[int, list[Grant]]:
        """Append segments (encoded or not), extend grants, end leases; returns the log position and a grant for each.

        What a segment repeats is compared, and the rest taken. Tokens beyond the grant are taken too, and counted in
        the ledger as `overdraft`. Without `wait` it answers before the segments are durable; `wait_durable` with the
        log position awaits that.

        Raises:
            Conflict: a gap, other content at the same offset, more than `max_tokens`, a version that decreases or was
                never published, a negative id, a log-prob that is not finite, or a temperature that is not above 0
                (evaluation: 0).
            ValueError: a token id is no int32.
        """
        encoded: Any = batch if isinstance(batch, bytes | memoryview | np.ndarray) else encode_segments(batch)
        lsn, replies = self._native.append(encoded, wait, now_s)
        return lsn, [Grant(trajectory=trajectory, stale=stale, tokens=grant) for trajectory, stale, grant in replies]

    def put_group(
        self,
        prompt: Prompt,
        completions: Sequence[ArrayLike],
        logprobs: Sequence[ArrayLike],
        rewards: Sequence[float],
        *,
        components: Sequence[Mapping[str, float]] | None = None,
        extra: Sequence[Columns] | None = None,
        trajectory_extra: Sequence[Columns] | None = None,
        request_id: str | None = None,
        version: int | None = None,
        temperature: float = 1.0,
    ) -> int:
        """Keep the finished attempts at a prompt, durably and ready to be claimed; returns the group id.

        Nothing else is needed: the first call publishes version 0. `claim` then takes what is there, at most
        `groups_per_iteration` groups, and does not wait for more. A group of fewer attempts than `min_group_size` is
        evicted. A call that was cut short or refused midway is finished by its repeat with the same `request_id`; until
        then a claim may wait for that group, which `discard` drops.

        It is for a store without rollout workers and scorers: it closes the token budget of the newest version, so that
        nobody leases, and refuses one that somebody opened. A score given by another is an error here.

        Args:
            prompt: What was completed.
            completions: Token ids of each attempt, at least one.
            logprobs: Log-probs of logits / temperature, one for each token.
            rewards: One for each attempt.
            components: Parts of each reward by name.
            extra: Named columns of each attempt, a value of any shape for each of its tokens.
            trajectory_extra: Named values of each attempt, of any shape. Both are in the claim and in the archive.
            request_id: Names the group, so that the call can be repeated; default: a new one.
            version: Policy version that generated them; default: the newest published one.
            temperature: Of the sampling.

        Raises:
            ValueError: lengths differ, a completion is empty, a number is not finite, the temperature is not above 0, a
                name is no text, or a column has not one value for each token; no group is there then.
            StoreFull: `max_bytes` is reached, or the disk is full.
            WaitTimeout: it is not on disk in time.
            Conflict: the id is that of another prompt or of other attempts, its group is gone, the version was never
                published, or others lease or score here.
        """
        attempts = attempts_of(completions, logprobs, rewards, components, extra, trajectory_extra)
        kept = sampled_at(temperature)
        name, number = uuid4().hex if request_id is None else request_id, None if version is None else index(version)
        return put_attempts(self, name, prompt, attempts, version=number, temperature=kept)

    def unscored(self, max_items: int, ttl_s: float, timeout_s: float, *, now_s: float | None = None) -> list[Unscored]:
        """Complete trajectories without a reward; each is handed out again only after `ttl_s` or a restart."""
        rows = self._native.unscored(max_items, ttl_s, timeout_s, now_s)
        return [
            Unscored(
                **row
                | {
                    "metadata": unpack_metadata(row["metadata"]),
                    "prompt": int32(row["prompt"]),
                    "tokens": int32(row["tokens"]),
                    "observed": np.frombuffer(row["observed"], np.uint8),
                    "stop": Stop(row["stop"]),
                    "rewards": rewards_said(row.pop("turns")),
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

        The first outcome of an attempt stands: another one is ignored, and counted in `Counts.scores_ignored`. Without
        `wait` it answers before that is durable.

        Raises:
            Conflict: not complete, a reward that is not finite, or an attempt that nobody was asked for.
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

    def restore(self, version: int, *, weights_of: int) -> None:
        """Make `version` the newest, with the weights of an older one, as a resume does: they age from where that was.

        Raises:
            Conflict: the version is not above every earlier one, or the other was never published.
        """
        self._native.restore(version, weights_of)

    def claim(self, iteration: int, version: int, timeout_s: float, *, now_s: float | None = None) -> ClaimAnswer:
        """Claim `iteration`'s groups for a learner at `version`, waiting until they are ready or rollout is closed.

        Undone claims come first, the oldest one each time: the same groups, order, version, masks and plan as before.

        Raises:
            Conflict: another claim is untrained, the iteration is not above every earlier one, the version was never
                published, or a repeat names another.
        """
        row = self._native.claim(iteration, version, timeout_s, now_s)
        return ClaimAnswer(**row | {"groups": tuple(row["groups"])})

    def record_plan(self, iteration: int, plan: ClaimPlan) -> None:
        """Record how `iteration`'s claim is dealt to optimizer steps, before it is trained; `read_claim` then has it.

        A claim that is undone is made again with its plan, whatever rule or settings are in force then.

        Raises:
            Conflict: there is no such claim, it has another plan or is trained, or the plan is of other groups.
        """
        self._native.record_plan(iteration, plan.rule, plan.seed, plan.num_steps, plan.steps.tolist())

    def prefetch(self) -> int:
        """Have the disk read the tokens of the next claim while this one is trained; returns how many, without waiting.

        They are those of the groups that `claim` would take now, and need no claim: its masks are computed when it is
        opened, by the version that it is opened with.
        """
        return self._native.prefetch()

    def commit(self, iteration: int) -> None:
        """A durable checkpoint covers every claim up to `iteration`.

        Raises:
            Conflict: one of them is not trained, or the store has no claim of `iteration`: a checkpoint is newer.
        """
        self._native.commit(iteration)

    def uncommit(self, iteration: int) -> list[int]:
        """Undo every claim after `iteration`, to be made again as they were. Returns the undone iterations.

        Raises:
            Conflict: one of them is evicted.
        """
        return self._native.uncommit(iteration)

    def evict(self, iteration: int) -> int:
        """Drop the groups of every committed claim up to `iteration`, and log files without live groups."""
        return self._native.evict(iteration)

    def discard(self, group: int, reason: str) -> bool:
        """Drop a group that no claim has, for good; what its workers append is stale. False when it is gone already.

        An undone claim is made again without it.

        Raises:
            Conflict: there never was such a group, a claim has it, or the reason is empty.
        """
        return self._native.discard(group, reason)

    def drop_eval(self, prefix: str) -> int:
        """Evict the evaluation groups whose request ids start with `prefix`; returns how many."""
        return self._native.drop_eval(prefix)

    def take_late(self) -> list[LateMembers]:
        """Groups that became ready without late members since the last call."""
        return [LateMembers(**row) for row in self._native.take_late()]

    def sync(self) -> int:
        """Bring every record so far to the disk, whatever `durability` is; returns the newest one's log position."""
        return self._native.sync()

    def wait_durable(self, lsn: int | None, timeout_s: float) -> bool:
        """Wait until every record up to `lsn` (None: the newest one) is on disk; False when it is not in time."""
        return self._native.wait_durable(lsn, timeout_s)


def _lease(row: dict[str, Any]) -> Lease:
    arrays = {
        "metadata": unpack_metadata(row["metadata"]),
        "prompt": int32(row["prompt"]),
        "prefix": int32(row["prefix"]),
        "prefix_observed": np.frombuffer(row["prefix_observed"], np.uint8),
    }
    return Lease(**row | arrays)
