"""A store alone: finished groups put in by whoever generated them, with TRL or plain transformers for example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import ArrayLike

from pmdflow._rust_buffer import Conflict, StoreFull
from pmdflow.errors import WaitTimeout
from pmdflow.store.columns import Column, Columns, encoded
from pmdflow.store.segments import encode_segments
from pmdflow.store.tokens import token_ids
from pmdflow.types import Float32, Int32, Prompt, Quota, Segment

if TYPE_CHECKING:
    from pmdflow.store.facade import TrajectoryStore

DURABLE_TIMEOUT_S = 60.0
"""A sync that takes longer than this is reported as a failure."""
_UNBOUNDED = 1 << 40
"""A quota of groups that never binds. Earlier versions opened the token budget by as much, which let workers lease."""
_ALONE = "put_group is for a store without rollout workers and scorers"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One finished completion of a prompt."""

    tokens: Int32
    logprobs: Float32
    """Log-probs of logits / temperature, shape of `tokens`."""
    reward: float
    components: Mapping[str, float]
    """Parts of the reward by name."""
    extra: Mapping[str, Column]
    """Extra columns of its tokens."""
    trajectory_extra: Mapping[str, Column]
    """Extra values of the attempt itself."""


def attempts_of(
    completions: Sequence[ArrayLike],
    logprobs: Sequence[ArrayLike],
    rewards: Sequence[float],
    components: Sequence[Mapping[str, float]] | None,
    extra: Sequence[Columns] | None,
    trajectory_extra: Sequence[Columns] | None,
) -> list[Attempt]:
    """What the caller of `put_group` gave, checked before anything is written.

    Raises:
        ValueError: lengths differ, a completion is empty, a number is none or not finite, or a name is no text.
    """
    count = len(completions)
    parts = components if components is not None else [{}] * count
    columns = extra if extra is not None else [{}] * count
    values = trajectory_extra if trajectory_extra is not None else [{}] * count
    counts = [count, *map(len, (logprobs, rewards, parts, columns, values))]
    if not 0 < min(counts) == max(counts):
        given = "{} completions, {} log-probs, {} rewards, {} components, {} extra and {} trajectory_extra".format(
            *counts
        )
        raise ValueError(f"{given}; give one of each for each attempt")
    attempts = zip(completions, logprobs, rewards, parts, columns, values, strict=True)
    return [_attempt(number, *attempt) for number, attempt in enumerate(attempts)]


def _attempt(
    number: int,
    completion: ArrayLike,
    logprobs: ArrayLike,
    reward: float,
    components: Mapping[str, float],
    extra: Columns,
    trajectory_extra: Columns,
) -> Attempt:
    tokens = token_ids(completion, of=f"attempt {number}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below as not finite
        scores = np.asarray(logprobs, np.float32)
    if tokens.ndim != 1 or len(tokens) == 0 or scores.shape != tokens.shape:
        raise ValueError(
            f"attempt {number}: {tokens.size} tokens with log-probs of shape {scores.shape}; give one or more "
            "tokens in a row and a log-prob for each"
        )
    if not isinstance(components, Mapping) or not all(_is_text(name) for name in components):
        raise ValueError(f"attempt {number}: components {components!r}; give a mapping from names (text) to numbers")
    try:
        worth, named = float(reward), {name: float(value) for name, value in components.items()}
    except (TypeError, OverflowError) as error:
        raise ValueError(f"attempt {number}: reward and its components must be numbers: {error}") from error
    if not np.isfinite(scores).all() or not np.isfinite([worth, *named.values()]).all():
        raise ValueError(f"attempt {number}: log-probs, reward and its components must be finite")
    of = f"attempt {number}"
    columns = {name: encoded(name, values, tokens=len(tokens), of=of)[1] for name, values in extra.items()}
    whole = {name: encoded(name, value, tokens=None, of=of)[1] for name, value in trajectory_extra.items()}
    return Attempt(tokens, scores, worth, named, columns, whole)


def sampled_at(temperature: float) -> float:
    """The temperature as the store keeps it, a float32.

    Raises:
        ValueError: nothing can be trained that was sampled at it.
    """
    with np.errstate(over="ignore", under="ignore"):
        kept = float(np.float32(temperature))
    if not np.finfo(np.float32).tiny <= kept <= np.finfo(np.float32).max:
        raise ValueError(f"temperature {temperature}; give a finite number above 0")
    return kept


def put_attempts(
    store: TrajectoryStore,
    request_id: str,
    prompt: Prompt,
    attempts: Sequence[Attempt],
    *,
    version: int | None,
    temperature: float,
) -> int:
    """Admit, append and score a group that is finished; each step is safe to repeat, and so is all of it."""
    longest = max(len(attempt.tokens) for attempt in attempts)
    while True:
        newest = _open_version(store, request_id)
        if version is not None and not 0 <= version <= newest:
            raise Conflict(f"group {request_id!r}: version {version} was never published, the newest is {newest}")
        try:
            group = store.admit(request_id, prompt, group_size=len(attempts), max_tokens=longest, wait=False)
            break
        except StoreFull:
            if store.counts().version == newest:
                raise
            # Somebody has published a version meanwhile, which has no room for groups yet.
    members = [row.trajectory for row in store.query(group=group)]
    put = _Put(store, request_id, group, dict(zip(members, attempts, strict=True)), version, newest, temperature)
    put.append_missing(put.check_stored())
    for member, attempt in put.attempts.items():
        store.score(member, 0, "scored", attempt.reward, attempt.components, wait=False)
    if not store.wait_durable(None, timeout_s=DURABLE_TIMEOUT_S):
        raise WaitTimeout(
            f"group {request_id!r} was not on disk within {DURABLE_TIMEOUT_S:g} s; repeat the call with this request_id"
        )
    put.check_kept()
    return group


@dataclass(frozen=True, slots=True)
class _Put:
    """One call of `put_group`, its group admitted."""

    store: TrajectoryStore
    request_id: str
    group: int
    attempts: Mapping[int, Attempt]
    """By trajectory."""
    version: int | None
    newest: int
    temperature: float

    def check_stored(self) -> list[int]:
        """Compare what an earlier call left with what this one gives; returns the trajectories still to be appended."""
        missing = []
        for (member, attempt), row in zip(self.attempts.items(), self.store.trajectories(self.attempts), strict=True):
            if row["state"] in ("leased", "idle"):
                missing.append(member)
            elif differs := self._difference(row, attempt):
                raise self._conflict(f"trajectory {member} is there already and {differs}; use a new request_id")
        return missing

    def append_missing(self, missing: Sequence[int]) -> None:
        """Append the attempts of the trajectories in `missing`, all or none; a failure leaves no lease behind."""
        if not missing:
            return
        worker = f"put_group {self.request_id} {uuid4().hex}"
        try:
            epochs = {lease.trajectory: lease.epoch for lease in self.store.lease_group(worker, self.group)}
            if taken := [member for member in missing if member not in epochs]:
                raise self._conflict(f"another worker holds trajectories {taken}; {_ALONE}")
            batch = encode_segments(
                [self._segment(member, epochs[member]) for member in missing],
                extra=[self.attempts[member].extra for member in missing],
                trajectory_extra=[self.attempts[member].trajectory_extra for member in missing],
            )
            _, grants = self.store.append(batch, wait=False)
            if stale := [grant.trajectory for grant in grants if grant.stale]:
                raise self._conflict(f"the leases of trajectories {stale} ended before the append; repeat the call")
        except BaseException:
            self.store.fence(worker)  # so that a repeat can lease them at once
            raise

    def check_kept(self) -> None:
        """See that the store has what was given: a scorer or the straggler rule may have been faster."""
        try:
            rows = self.store.trajectories(self.attempts)
        except Conflict:
            return  # evicted: it has fewer attempts than `min_group_size`, or was trained and archived meanwhile
        for (member, attempt), row in zip(self.attempts.items(), rows, strict=True):
            if differs := self._difference(row, attempt):
                raise self._conflict(
                    f"trajectory {member} {differs}: something else answered first; {_ALONE}. The group is not what "
                    f"was given: discard({self.group}, reason) drops it"
                )

    def _segment(self, member: int, epoch: int) -> Segment:
        attempt = self.attempts[member]
        return Segment(
            trajectory=member,
            epoch=epoch,
            offset=0,
            version=self.newest if self.version is None else self.version,
            temperature=self.temperature,
            tokens=attempt.tokens,
            logprobs=attempt.logprobs,
            next_version=self.newest,
            stop="stop",
        )

    def _difference(self, row: Mapping[str, Any], attempt: Attempt) -> str | None:
        """How a complete trajectory differs from its attempt, but for a reward still to come; None if it does not."""
        if not np.array_equal(row["tokens"], attempt.tokens) or row["observed"].any():
            return "has other tokens"
        if not np.array_equal(row["logprobs"], attempt.logprobs):
            return "has other log-probs"
        kept = {name: own[0][2] if isinstance(own, list) else own for name, own in row["extra"].items()}
        if not _same(kept, {**attempt.extra, **attempt.trajectory_extra}):
            return "has other extra columns"
        for _, version, temperature, _ in row["segments"]:
            if temperature != self.temperature:
                return f"has temperature {temperature:g}, not {self.temperature:g}"
            if self.version is not None and version != self.version:
                return f"has version {version}, not {self.version}"
        if row["state"] == "scored" and (row["reward"], row["components"]) != (attempt.reward, attempt.components):
            kept, given = dict(row["components"]), dict(attempt.components)
            return f"has reward {row['reward']} {kept}, not {attempt.reward} {given}"
        return f"is {row['state']}" if row["state"] in ("late", "failed") else None

    def _conflict(self, what: str) -> Conflict:
        return Conflict(f"group {self.request_id!r} ({self.group}): {what}")


def _open_version(store: TrajectoryStore, request_id: str) -> int:
    """The newest version, with room for groups and no budget: nobody can lease what is put in. The first is made here.

    Raises:
        Conflict: its budget is open to rollout workers.
    """
    counts = store.counts()
    if counts.tokens_budget not in (0, _UNBOUNDED):
        raise Conflict(
            f"group {request_id!r}: version {counts.version} has a budget of {counts.tokens_budget} tokens, by which "
            f"workers lease; {_ALONE}"
        )
    if counts.version < 0:
        store.publish(0)
    newest = max(counts.version, 0)
    store.set_quota(Quota(version=newest, groups=_UNBOUNDED, tokens=0, tokens_per_segment=None))
    return newest


def _same(kept: Mapping[str, Column], given: Mapping[str, Column]) -> bool:
    return kept.keys() == given.keys() and all(
        kept[name].dtype == given[name].dtype and np.array_equal(kept[name], given[name], equal_nan=True)
        for name in kept
    )


def _is_text(name: object) -> bool:
    """Whether it is text that UTF-8 has."""
    return isinstance(name, str) and name.encode("utf-8", "replace").decode() == name
