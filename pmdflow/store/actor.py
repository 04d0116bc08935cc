"""The trajectory store as a Ray actor: blocking calls in their own concurrency groups, every wait with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray

from pmdflow._rust_buffer import Conflict, StoreFull, StoreLocked
from pmdflow.errors import WaitTimeout
from pmdflow.metrics.report import ActorReport, Event
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.store.answers import ClaimAnswer, EvalResult, LateMembers
from pmdflow.store.archive import write_part
from pmdflow.store.facade import TrajectoryStore
from pmdflow.store.plan import deal
from pmdflow.store.settings import StoreSettings
from pmdflow.types import Counts, Grant, Lease, Outcome, Prompt, Quota, TrainBatch, Unscored

Method = TypeVar("Method", bound=Callable[..., Any])

LOCK_TIMEOUT_S = 30.0
"""How long opening waits for a killed predecessor to let go of the store's lock."""
DURABLE_TIMEOUT_S = 60.0
"""A sync that takes longer than this is reported as a failure."""


def _in_group(name: str) -> Callable[[Method], Method]:
    """Give a method threads of its own, so that calls which wait do not stop the others; its type stays."""

    def decorate(method: Method) -> Method:
        ray.method(concurrency_group=name)(method)  # marks the method itself
        return method

    return decorate


class StoreActor:
    """Owns the one `TrajectoryStore` of a run. Its methods are the store's; see `pmdflow.store`.

    Consumes: appends, scores and admissions. Produces: leases, unscored trajectories and claims.
    Waits for nothing but its callers; a waiting caller is woken by the state change that it waits for.
    """

    def __init__(
        self,
        *,
        directory: str,
        run_dir: str,
        settings: StoreSettings,
        archive_attrs: dict[str, Any],
        steps_per_iteration: int,
        seed: int,
    ) -> None:
        """Open the store in `directory`; `settings` are those of `TrajectoryStore`, `seed` is the run's."""
        self._run_dir = Path(run_dir)
        self._archive_attrs = archive_attrs
        self._steps_per_iteration = steps_per_iteration
        self._seed = seed
        self._archived: set[int] = set()
        """Iterations whose claims this process has archived: they need not be read again until they are undone."""
        self._spans = SpanBuffer("store")
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                self._store = TrajectoryStore(directory, **settings)
                break
            except StoreLocked:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    @_in_group("lease")
    def lease(self, worker: str, version: int, max_leases: int, timeout_s: float) -> list[Lease]:
        """Lease trajectories to a rollout actor; waits for the first one."""
        return self._store.lease(worker, version, max_leases, timeout_s)

    def fence(self, worker: str) -> int:
        """End every lease of a worker that is dead, and lease nothing to it again."""
        return self._store.fence(worker)

    @_in_group("append")
    def append(self, batch: bytes) -> list[Grant]:
        """Append encoded segments; answers once they are durable."""
        return self._store.append(batch)[1]

    @_in_group("score")
    def unscored(self, max_items: int, ttl_s: float, timeout_s: float) -> list[Unscored]:
        """Complete trajectories that await their reward; waits for the first one."""
        return self._store.unscored(max_items, ttl_s, timeout_s)

    @_in_group("score")
    def score(self, scores: Sequence[tuple[int, int, Outcome, float, dict[str, float]]]) -> None:
        """Record (trajectory, attempt, outcome, reward, components) of several trajectories.

        What is handed out again after its time may be answered by two actors, with two outcomes: the store keeps the
        first one.
        """
        for trajectory, attempt, outcome, reward, components in scores:
            self._store.score(trajectory, attempt, outcome, reward, components, wait=False)
        self._await_durable()

    @_in_group("claim")
    def claim(self, iteration: int, version: int, timeout_s: float) -> ClaimAnswer:
        """Claim an iteration's groups; waits until it can."""
        return self._store.claim(iteration, version, timeout_s)

    @_in_group("claim")
    def read_claim(self, iteration: int) -> TrainBatch:
        """The claimed groups as packed arrays, and the plan that deals them to optimizer steps."""
        batch = self._store.read_claim(iteration)
        return replace(batch, plan=deal(batch, self._steps_per_iteration, seed=self._seed))

    def admit(
        self,
        prompts: Sequence[tuple[str, int | None, Prompt]],
        kind: Literal["train", "eval"],
        group_size: int,
        max_tokens: int,
    ) -> int:
        """Admit (request id, cursor, prompt) in order, stopping at the first that is refused; returns how many were."""
        admitted = 0
        for request_id, cursor, prompt in prompts:
            try:
                self._store.admit(
                    request_id,
                    cursor=cursor,
                    kind=kind,
                    prompt=prompt,
                    group_size=group_size,
                    max_tokens=max_tokens,
                    wait=False,
                )
            except StoreFull:
                break
            admitted += 1
        self._await_durable()
        return admitted

    def set_quota(self, quota: Quota) -> None:
        """Set what rollout may do under a version."""
        self._store.set_quota(quota)

    def publish(self, version: int, iteration: int | None, left_out: dict[str, list[int]]) -> None:
        """Make `version` the newest and the iteration's claim trained, but for the trajectories left out by reason."""
        self._store.publish(version, iteration, left_out)

    def commit(self, iteration: int) -> None:
        """A checkpoint covers every claim up to `iteration`."""
        self._store.commit(iteration)

    def uncommit(self, iteration: int) -> list[int]:
        """Undo every claim after `iteration`."""
        self._archived = {archived for archived in self._archived if archived <= iteration}
        return self._store.uncommit(iteration)

    @_in_group("archive")
    def archive(self, iterations: Sequence[int], evict_through: int) -> None:
        """Archive the committed claims of `iterations`, then evict what lies at or before `evict_through`."""
        for iteration in iterations:
            if iteration in self._archived:
                continue
            with self._spans.span("archive", iteration=iteration):
                write_part(self._run_dir, self.read_claim(iteration), attrs=self._archive_attrs)
            self._archived.add(iteration)
        self._store.evict(evict_through)

    def discard(self, group: int, reason: str) -> str:
        """Drop a group that no claim has; returns what became of it, in words."""
        try:
            return f"is discarded: {reason}" if self._store.discard(group, reason) else "was gone already"
        except (Conflict, StoreFull) as error:
            return f"is kept: {error}"

    def sync(self) -> int:
        """Bring everything so far to the disk, whatever the durability; returns the log position up to which it is."""
        return self._store.sync()

    def _await_durable(self) -> None:
        """Wait until everything so far is as durable as the settings promise.

        Raises:
            WaitTimeout: it is not in time.
        """
        if not self._store.wait_durable(None, DURABLE_TIMEOUT_S):
            raise WaitTimeout(f"the trajectory store was not on disk within {DURABLE_TIMEOUT_S:g} s")

    @_in_group("claim")
    def eval_results(self, prefix: str, timeout_s: float) -> list[EvalResult] | None:
        """Results of one evaluation, or None if some are missing after `timeout_s`."""
        return self._store.eval_results(prefix, timeout_s)

    def drop_eval(self, prefix: str) -> int:
        """Forget the evaluation groups whose request ids start with `prefix`."""
        return self._store.drop_eval(prefix)

    def counts(self) -> Counts:
        """Live numbers."""
        return self._store.counts()

    def ledger(self) -> dict[str, int]:
        """The token ledger."""
        return self._store.ledger()

    def sample(self) -> tuple[Counts, dict[str, int]]:
        """Counts and ledger together."""
        return self._store.counts(), self._store.ledger()

    def claims(self) -> dict[int, str]:
        """State of every claim whose groups are still in the store: `claimed`, `trained` or `committed`."""
        return self._store.claims()

    def drain(self) -> ActorReport:
        """Spans, and groups that became ready without late members, since the last call."""
        late = [_late(members) for members in self._store.take_late()]
        return ActorReport(spans=self._spans.drain(), events=[*late, *self._spans.losses()])

    def close(self) -> None:
        """Sync and let go of the directory."""
        self._store.close()


def _late(late: LateMembers) -> Event:
    message = (
        f"group {late.group} ({late.prompt_id}) does not wait for its late members: {late.members} evicted "
        f"with {late.tokens} tokens"
    )
    attrs = {"group": late.group, "members": late.members, "tokens": late.tokens}
    return Event(kind="late_members", message=message, attrs=attrs)
