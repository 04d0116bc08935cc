"""The trajectory store as a Ray actor: blocking calls in their own concurrency groups, every wait with a deadline."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import ray

from pmdflow._rust_buffer import Conflict, StoreFull, StoreLocked
from pmdflow.errors import WaitTimeout
from pmdflow.metrics.order import Claimed
from pmdflow.metrics.report import ActorReport, Event
from pmdflow.store.alone import DURABLE_TIMEOUT_S
from pmdflow.store.annotations import Unannotated
from pmdflow.store.answers import ClaimAnswer, EvalResult, Forked, LateMembers, Successes
from pmdflow.store.episodes import TurnNote
from pmdflow.store.facade import TrajectoryStore
from pmdflow.store.plan import deal, in_claim_order
from pmdflow.store.settings import StoreSettings
from pmdflow.types import Claim, ClaimTokens, Counts, Grant, Int64, Lease, Outcome, Prompt, Quota, UInt8, Unscored

Method = TypeVar("Method", bound=Callable[..., Any])

LOCK_TIMEOUT_S = 30.0
"""How long opening waits for a killed predecessor to let go of the store's lock."""


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

    def __init__(self, *, directory: str, settings: StoreSettings, steps_per_iteration: int, seed: int) -> None:
        """Open the store in `directory`; `settings` are those of `TrajectoryStore`, `seed` is the run's."""
        self._steps_per_iteration = steps_per_iteration
        self._seed = seed
        self._room = _Room()
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
    def lease(
        self, worker: str, version: int, max_leases: int, timeout_s: float, kind: Literal["train", "eval"] | None = None
    ) -> list[Lease]:
        """Lease trajectories to a rollout actor, of one kind or of both; waits for the first one."""
        return self._store.lease(worker, version, max_leases, timeout_s, kind=kind)

    def fence(self, worker: str) -> int:
        """End every lease of a worker that is dead, and lease nothing to it again."""
        return self._store.fence(worker)

    @_in_group("append")
    def append(self, batch: UInt8, notes: Sequence[TurnNote] = ()) -> list[Grant]:
        """Note what is said of episodes, then append encoded segments; answers once all of it is durable.

        The segments are an array so that Ray moves bytes as they are.
        """
        for trajectory, epoch, number, rewards, key in notes:
            self._store.turn(trajectory, epoch, number, rewards, key, wait=False)
        return self._store.append(batch)[1]

    @_in_group("append")
    def fork(self, trajectory: int, epoch: int, offset: int) -> Forked:
        """Go on in a new branch of a leased episode, which keeps `offset` tokens of the newest one's history."""
        return self._store.fork(trajectory, epoch, offset)

    @_in_group("append")
    def turn(self, trajectory: int, epoch: int, number: int, rewards: dict[str, float], key: str | None) -> bool:
        """Note what is said of a leased episode; True if the lease was fenced."""
        return self._store.turn(trajectory, epoch, number, rewards, key)

    @_in_group("append")
    def trajectory(self, trajectory: int) -> dict[str, Any] | None:
        """One live trajectory with its arrays; None if it is in the store no more."""
        with contextlib.suppress(Conflict):
            return self._store.trajectory(trajectory)
        return None

    @_in_group("append")
    def epochs(self, trajectories: Sequence[int]) -> dict[int, int]:
        """Fencing epochs of those trajectories that are in the store."""
        return self._store.epochs(trajectories)

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

    @_in_group("score")
    def unannotated(self, scorer: str, max_items: int, ttl_s: float, timeout_s: float) -> list[Unannotated]:
        """Complete trajectories that a scorer has not seen; waits for the first one."""
        return self._store.unannotated(scorer, max_items, ttl_s, timeout_s)

    @_in_group("score")
    def annotate(
        self, scorer: str, columns: Mapping[int, Mapping[str, npt.NDArray[Any]]], failed: Mapping[int, int]
    ) -> None:
        """Add a scorer's columns by trajectory; of those that it failed on, by the attempt, the failure."""
        for trajectory, own in columns.items():
            self._store.annotate(trajectory, scorer, own, wait=False)
        for trajectory, attempt in failed.items():
            self._store.score(trajectory, attempt, "infra_failure", wait=False)
        self._await_durable()

    @_in_group("claim")
    def claim(self, iteration: int, version: int, timeout_s: float) -> ClaimAnswer:
        """Claim an iteration's groups; waits until it can."""
        return self._store.claim(iteration, version, timeout_s)

    @_in_group("claim")
    def read_rows(self, iteration: int) -> Claim:
        """A claim without its tokens, and the plan that deals its groups to optimizer steps.

        The plan is made and recorded when the claim is first read; one that was undone at a resume has it already.
        The next claim's tokens are read from the disk meanwhile.
        """
        claim = self._store.read_rows(iteration)
        self._store.prefetch()
        if claim.plan is not None:
            return claim
        if self._store.claims()[iteration] != "claimed":  # trained before plans were recorded, so by the rule of then
            plan = in_claim_order(len(claim.group_starts()), self._steps_per_iteration)
        else:
            plan = deal(claim, self._steps_per_iteration, seed=self._seed)
            self._store.record_plan(iteration, plan)
        return replace(claim, plan=plan)

    @_in_group("read")
    def look_at(self, claim: Claim) -> Claimed:
        """The numbers of a claim that was read: whoever wants no more does not fetch it."""
        return Claimed.of(claim)

    @_in_group("read")
    def read_tokens(self, trajectories: Int64) -> ClaimTokens:
        """The tokens of trajectories, packed in that order.

        They are read into memory that the thread uses again: Ray has copied an answer into shared memory, which whoever
        asked maps, before the thread takes the next call.
        """
        return self._room.read(self._store, trajectories)

    @_in_group("read")
    def read_columns(
        self, trajectories: Int64, starts: Int64, total: int, names: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Extra columns of tokens of trajectories; see `StoreView.read_columns`."""
        return self._store.read_columns(trajectories, starts=starts, total=total, names=names)

    def admit(
        self,
        prompts: Sequence[tuple[str, int | None, Prompt]],
        kind: Literal["train", "eval"],
        group_size: int,
        max_tokens: int,
        priority: int = 0,
    ) -> list[int]:
        """Admit (request id, cursor, prompt) in order, stopping at the first that is refused; returns their groups."""
        admitted = []
        for request_id, cursor, prompt in prompts:
            try:
                group = self._store.admit(
                    request_id,
                    cursor=cursor,
                    kind=kind,
                    prompt=prompt,
                    group_size=group_size,
                    max_tokens=max_tokens,
                    priority=priority,
                    wait=False,
                )
            except StoreFull:
                break
            admitted.append(group)
        self._await_durable()
        return admitted

    def set_quota(self, quota: Quota) -> None:
        """Set what rollout may do under a version."""
        self._store.set_quota(quota)

    def in_flight(self) -> dict[int, int]:
        """Trajectories that are not complete, by the version that may extend them."""
        return self._store.in_flight()

    def set_oldest(self, version: int) -> None:
        """Weights of versions below this one are lost."""
        self._store.set_oldest(version)

    @_in_group("claim")
    def wait_drained(self, version: int, timeout_s: float) -> bool:
        """Wait until no trajectory of an older version is in flight; False if there is one after `timeout_s`."""
        return self._store.wait_drained(version, timeout_s)

    def publish(self, version: int, iteration: int | None, left_out: dict[str, list[int]]) -> None:
        """Make `version` the newest and the iteration's claim trained, but for the trajectories left out by reason."""
        self._store.publish(version, iteration, left_out)

    def restore(self, version: int, weights_of: int) -> None:
        """Make `version` the newest, with the weights of an older one."""
        self._store.restore(version, weights_of=weights_of)

    def commit(self, iteration: int) -> None:
        """A checkpoint covers every claim up to `iteration`."""
        self._store.commit(iteration)

    def uncommit(self, iteration: int) -> list[int]:
        """Undo every claim after `iteration`."""
        return self._store.uncommit(iteration)

    @_in_group("evict")
    def evict(self, iteration: int) -> int:
        """Drop the groups of every committed claim up to `iteration`, all of them archived; returns how many."""
        return self._store.evict(iteration)

    def node(self) -> str:
        """The node that it is on, where its files are read best."""
        return str(ray.get_runtime_context().get_node_id())

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

    def unfinished_eval(self, prefix: str) -> list[str]:
        """Prompts of one evaluation of which an answer is not complete."""
        groups = [group for group in self._store.groups() if group["kind"] == "eval"]
        return [
            str(group["prompt_id"])
            for group in groups
            if group["request_id"].startswith(prefix)
            and any(self._store.trajectory(id)["state"] in ("leased", "idle") for id in group["trajectories"])
        ]

    def renew_eval(
        self, prefix: str, prompts: Sequence[tuple[str, int | None, Prompt]], samples: int, max_tokens: int
    ) -> list[int]:
        """Admit an evaluation whose request ids start with `prefix`, and forget what there was of it."""
        self._store.drop_eval(prefix)
        return self.admit(prompts, "eval", samples, max_tokens)

    def drop_eval(self, prefix: str) -> int:
        """Forget the evaluation groups whose request ids start with `prefix`."""
        return self._store.drop_eval(prefix)

    def counts(self) -> Counts:
        """Live numbers."""
        return self._store.counts()

    def successes(self, after: int) -> Successes:
        """Rates of success; see `TrajectoryStore.successes`."""
        return self._store.successes(after)

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
        """Groups that became ready without late members since the last call."""
        return ActorReport(spans=[], events=[_late(members) for members in self._store.take_late()])

    def close(self) -> None:
        """Sync and let go of the directory."""
        self._store.close()


class _Room(threading.local):
    """Arrays of one thread, as long as the longest answer so far."""

    def __init__(self) -> None:
        self._arrays = ClaimTokens(tokens=np.empty(0, np.int32), logprobs=np.empty(0, np.float32))

    def read(self, store: TrajectoryStore, trajectories: Int64) -> ClaimTokens:
        needed = store.count_tokens(trajectories)
        if needed > len(self._arrays.tokens):
            self._arrays = ClaimTokens(tokens=np.empty(needed, np.int32), logprobs=np.empty(needed, np.float32))
        return store.read_tokens(trajectories, out=self._arrays)


def _late(late: LateMembers) -> Event:
    message = (
        f"group {late.group} ({late.prompt_id}) does not wait for its late members: {late.members} evicted "
        f"with {late.tokens} tokens"
    )
    attrs = {"group": late.group, "members": late.members, "tokens": late.tokens}
    return Event(kind="late_members", message=message, attrs=attrs)
