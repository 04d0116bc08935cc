"""One simulated run: the real store in memory and the real scheduler, with everything else as events on a clock."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from pmdflow.errors import PmdflowError
from pmdflow.metrics.claim import claim_metrics
from pmdflow.metrics.order import AdmissionOrder
from pmdflow.run.scheduler import SchedulerSettings, must_regrant, next_quota
from pmdflow.run.simulation.models import EngineModel, LearnerModel, Lengths
from pmdflow.run.simulation.report import SimulatedIteration, SimulationReport
from pmdflow.run.simulation.worker import Worker
from pmdflow.store.facade import TrajectoryStore
from pmdflow.store.segments import encode_segments
from pmdflow.types import Claim, Mask, Outcome, Prompt

LEASE_TTL_S = 1e9
"""Leases of live actors never expire: a simulated one appends when sequences end, not several times a second."""
ASKED_EVERY = 64
"""Events between two questions whether to go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """A workload and a machine. The token is whatever unit all numbers agree on."""

    scheduler: SchedulerSettings
    max_staleness: int | None
    window: int | None = None
    iterations: int
    group_size: int
    max_tokens: int
    """Generated tokens of one trajectory at most."""
    lengths: Lengths
    engine: EngineModel
    learner: LearnerModel
    actors: int = 1
    """Rollout actors."""
    prompt_tokens: int = 3
    score_s: float = 0.0
    """Seconds from the end of a trajectory to its reward."""
    grant_tokens: int = 64
    lost_share: float = 0.0
    """Chance that a rollout actor dies where its sequences end or are granted more."""
    replace_s: float = 5.0
    """Seconds until another takes its place, and its leases are ended."""
    infra_failure_share: float = 0.0
    """Share of scoring attempts that fail."""
    refill_limit: int | None = None
    """Groups without a signal are evicted, and at most so many times `groups_per_iteration` admitted in their place;
    None trains them."""
    no_signal_share: float = 0.0
    """Share of groups whose members all get the same reward."""
    seed: int = 0


class Simulation:
    """One simulated run over an in-memory store.

    Example:
        >>> scheduler = SchedulerSettings(
        ...     groups_per_iteration=2, tokens_per_iteration=200, tokens_per_segment=None, lookahead=1)
        >>> settings = SimulationSettings(
        ...     scheduler=scheduler, max_staleness=4, iterations=3, group_size=2, max_tokens=60,
        ...     lengths=LognormalLengths(median=20, p99=60), engine=EngineModel(slots=4, step_s=0.02),
        ...     learner=LearnerModel(iteration_s=1.0))
        >>> len(Simulation(settings).run().iterations)
        3
    """

    def __init__(self, settings: SimulationSettings) -> None:
        """Prepare an empty store at version 0."""
        self._settings = settings
        self._rng = np.random.default_rng(settings.seed)
        self._store = TrajectoryStore(
            None,
            groups_per_iteration=settings.scheduler.groups_per_iteration,
            lookahead=settings.scheduler.lookahead,
            max_staleness=settings.max_staleness,
            window=settings.window,
            signal=None if settings.refill_limit is None else (0.0, 1.0),
            min_group_size=min(2, settings.group_size),
            lease_ttl_s=LEASE_TTL_S,
            grant_tokens=settings.grant_tokens,
        )
        self._report = SimulationReport(actors=settings.actors)
        self._workers = [Worker(name=f"rollout-{index}", engine=settings.engine) for index in range(settings.actors)]
        self._waiting: dict[int, None] = {}
        """Workers without a sequence, those that have waited longest first."""
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._serial = 0
        self._version = 0
        self._budgeted = settings.scheduler
        self._rates: list[float] = []
        self._rated = (0, 0.0)
        """Tokens and busy seconds of all workers up to the newest rate."""
        self._budgets: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        """Of trajectories that have begun and not ended."""
        self._unused: dict[int, list[int]] = {}
        """Of each group: lengths of members that have not begun."""
        self._dull: dict[int, bool] = {}
        """Whether a group's members all get the same reward."""
        self._refills = self._most_refills
        """Groups that may still be admitted before the next claim in the place of others."""
        self._order = AdmissionOrder()
        self._free_since: float | None = 0.0
        """Since when the learner has waited for a claim; None while it trains."""

    def run(self, *, max_events: int = 50_000_000, give_up: Callable[[], bool] = lambda: False) -> SimulationReport:
        """Run to the end.

        Raises:
            TimeoutError: `give_up`, which is asked now and then, said so.
            RuntimeError: nothing happens any more, or it was not over after `max_events`.
            PmdflowError: no group has a signal.
        """
        self._store.publish(0, None, {})
        self._grant()
        self._admit()
        self._waiting = dict.fromkeys(range(len(self._workers)))
        for worker in self._workers:
            worker.waits_since, worker.cause = 0.0, "start"
        self._wake(0.0)
        now, events = 0.0, 0
        while len(self._report.iterations) < self._settings.iterations:
            if not self._events or events >= max_events:
                raise RuntimeError(f"not over after {events} events and {now:g} s: {self._store.counts()}")
            now, _, happen = heapq.heappop(self._events)
            happen(now)
            events += 1
            if events % ASKED_EVERY == 0 and give_up():
                raise TimeoutError(f"not over after {events} events")
        self._finish(now)
        return self._report

    def _at(self, time: float, happen: Callable[[float], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time, self._serial, happen))

    def _rate(self) -> None:
        """Measure the rate of the iteration that ends: an automatic budget follows from it."""
        generated, busy_s = self._store.ledger()["generated"], sum(worker.busy_s for worker in self._workers)
        tokens, seconds = generated - self._rated[0], busy_s - self._rated[1]
        if tokens and seconds > 0:
            self._rates.append(tokens / seconds * len(self._workers))
        self._rated = generated, busy_s

    def _grant(self) -> None:
        quota = next_quota(self._budgeted, self._store.counts())
        self._budgets[quota.version] = quota.tokens
        self._store.set_quota(quota)

    def _check_budgets(self) -> None:
        over = [spent - self._budgets[version] for version, spent in self._store.versions_spent().items()]
        self._report.overspent_tokens = max([self._report.overspent_tokens, *over])

    @property
    def _most_refills(self) -> int:
        limit = self._settings.refill_limit
        return sys.maxsize if limit is None else limit * self._settings.scheduler.groups_per_iteration

    def _admit(self, most: int = sys.maxsize) -> int:
        counts = self._store.counts()
        room = min(self._settings.scheduler.room(counts), most)
        tokens = np.zeros(self._settings.prompt_tokens, np.int32)
        groups = [
            self._store.admit(
                f"train-{cursor}",
                Prompt(id=str(cursor), text="", tokens=tokens),
                cursor=cursor,
                group_size=self._settings.group_size,
                max_tokens=self._settings.max_tokens,
            )
            for cursor in range(counts.next_cursor, counts.next_cursor + room)
        ]
        self._order.admitted(groups, iteration=len(self._report.iterations) + 1)
        report = self._report
        report.max_groups_untrained = max(report.max_groups_untrained, counts.groups_untrained + room)
        return room

    # Rollout.

    def _wake(self, now: float) -> None:
        """Let workers that wait look for leases, until one finds none."""
        for index in list(self._waiting):
            if not self._lease(index, now):
                return

    def _lease(self, index: int, now: float, *, delay_s: float = 0.0) -> bool:
        """Fill a worker's free slots and let it go on; whether it has something to generate."""
        worker = self._workers[index]
        free = worker.engine.slots - len(worker.running)
        for lease in self._store.lease(worker.name, worker.version, free, 0.0, now_s=now) if free else ():
            delay_s += worker.join(lease, length=self._length(lease.trajectory, lease.group))
        end = worker.begin(now, delay_s=delay_s, training=self._free_since is None)
        if end is None:
            if worker.waits_since is None:
                worker.waits_since, worker.cause = now, self._cause()
            self._waiting[index] = None
            return False
        if worker.waits_since is not None:
            self._waited(worker, now)
        self._waiting.pop(index, None)
        worker.serial += 1
        self._at(end, partial(self._due, index, worker.serial))
        return True

    def _waited(self, worker: Worker, now: float) -> None:
        assert worker.waits_since is not None
        waits = self._report.waits_s
        waits[worker.cause] = waits.get(worker.cause, 0.0) + now - worker.waits_since
        worker.waits_since = None

    def _cause(self) -> str:
        """Why nothing can be leased; where phases alternate, it is first the last answers, then the learner."""
        counts = self._store.counts()
        alternates = self._settings.scheduler.lookahead == 0
        if alternates and counts.groups_claimed:
            return "training"
        if counts.trajectories_idle:
            return "budget"
        return "last answers" if alternates else "lookahead"

    def _due(self, index: int, serial: int, now: float) -> None:
        """Sequences of a worker have ended or need grants."""
        worker = self._workers[index]
        if serial != worker.serial:
            return  # new weights have come between
        worker.advance(now)
        if self._settings.lost_share and self._rng.random() < self._settings.lost_share:
            worker.forget()
            worker.serial += 1
            self._at(now + self._settings.replace_s, partial(self._replace, index))
            return
        self._append(worker, worker.take_due(), next_version=worker.version, now=now)
        if not self._lease(index, now):
            self._claim(now)

    def _replace(self, index: int, now: float) -> None:
        """Another worker takes the place of a dead one, whose leases end."""
        worker = self._workers[index]
        self._store.fence(worker.name)
        worker.name += "'"
        worker.version, worker.lost = self._version, False
        if not self._lease(index, now):
            self._claim(now)
        self._wake(now)

    def _append(self, worker: Worker, trajectories: list[int], *, next_version: int, now: float) -> None:
        if not trajectories:
            return
        segments = list(worker.segments(trajectories, next_version=next_version, max_tokens=self._settings.max_tokens))
        _, grants = self._store.append(encode_segments(segments), now_s=now)
        ended = 0
        for segment, grant in zip(segments, grants, strict=True):
            worker.answered(segment, grant, prompt_tokens=self._settings.prompt_tokens)
            if segment.stop is not None and segment.stop != "budget" and not grant.stale:
                del self._lengths[segment.trajectory]
                ended += 1
        if ended:
            self._at(now + self._settings.score_s, self._score)

    def _length(self, trajectory: int, group: int) -> int:
        if trajectory not in self._lengths:
            if group not in self._unused:
                drawn = self._settings.lengths.group(self._rng, self._settings.group_size)
                self._unused[group] = [min(length, self._settings.max_tokens) for length in drawn]
            self._lengths[trajectory] = self._unused[group].pop()
            if not self._unused[group]:
                del self._unused[group]
        return self._lengths[trajectory]

    def _offer(self, version: int, now: float) -> None:
        """A version reaches every worker: it ends segments, not leases."""
        for index, worker in enumerate(self._workers):
            if worker.lost:
                continue
            if worker.running:
                worker.advance(now)
            self._append(worker, list(worker.running), next_version=version, now=now)
            worker.version = version
            self._lease(index, now, delay_s=worker.engine.apply_s)
        self._check_budgets()

    def _score(self, now: float) -> None:
        for item in self._store.unscored(1 << 20, 1.0, 0.0, now_s=now):
            failed = self._settings.infra_failure_share and self._rng.random() < self._settings.infra_failure_share
            outcome: Outcome = "infra_failure" if failed else "scored"
            self._store.score(item.trajectory, item.attempt, outcome, self._reward(item.group), {}, now_s=now)
            if failed:
                self._at(now + self._settings.score_s, self._score)
        self._claim(now)

    def _reward(self, group: int) -> float:
        if group not in self._dull:
            self._dull[group] = bool(self._rng.random() < self._settings.no_signal_share)
        return 1.0 if self._dull[group] else float(self._rng.integers(2))

    # The learner.

    def _claim(self, now: float) -> None:
        """Begin the next iteration if its groups are ready; where it starves, do as the controller does."""
        if self._free_since is None:
            return
        iteration = len(self._report.iterations) + 1
        answer = self._store.claim(iteration, self._version, 0.0, now_s=now)
        if answer.status == "claimed":
            self._train(iteration, now)
            return
        if answer.status != "starved":
            return
        if self._refills == 0 and self._store.counts().groups_untrained == 0:
            raise PmdflowError(
                f"no group is left to train after {self._store.counts().groups_no_signal} without a signal"
            )
        admitted = self._admit(self._refills) if self._refills else 0
        self._refills -= admitted
        if must_regrant(answer, admitted=admitted):
            self._report.regrants += 1
            self._grant()
        self._wake(now)
        self._at(now, self._claim)

    def _train(self, iteration: int, now: float) -> None:
        assert self._free_since is not None
        wait_s, self._free_since = now - self._free_since, None
        claim = self._store.read_rows(iteration)
        values = claim_metrics(claim)
        order = self._order.claimed(claim, oldest_untrained=self._store.counts().oldest_untrained)
        lengths = _group_means(claim)
        self._report.short_claims += len(lengths) < self._settings.scheduler.groups_per_iteration
        train_s, publish_s = self._settings.learner.train_s(int(claim.cu_seqlens[-1])), self._settings.learner.publish_s
        done = SimulatedIteration(
            end_s=now + train_s + publish_s,
            wait_s=wait_s,
            train_s=train_s,
            publish_s=publish_s,
            lengths=lengths,
            tokens=int(claim.count(Mask.GENERATED).sum()),
            trained=int(claim.count(Mask.TRAINED).sum()),
            masked_by_decile=values["staleness/masked_share_by_decile"],
            staleness_mean=values["staleness/mean"] or 0.0,
            staleness_max=values["staleness/max"] or 0,
            passed=order["trajectory/bypasses_max"] or 0,
        )
        self._at(done.end_s, partial(self._publish, done))
        for index in self._waiting:
            self._waited(self._workers[index], now)
            self._workers[index].waits_since, self._workers[index].cause = now, self._cause()

    def _publish(self, done: SimulatedIteration, now: float) -> None:
        iteration = len(self._report.iterations) + 1
        self._version += 1
        self._store.publish(self._version, iteration, {})
        self._rate()
        self._budgeted = self._settings.scheduler.budgeted(self._rates)
        self._grant()
        self._store.commit(iteration)
        self._store.evict(iteration)
        self._report.iterations.append(done)
        self._free_since, self._refills = now, self._most_refills
        self._admit()
        self._offer(self._version, now)
        self._claim(now)

    def _finish(self, now: float) -> None:
        report = self._report
        self._check_budgets()
        for worker in self._workers:
            worker.advance(now)
            report.busy_s += worker.busy_s
            if worker.waits_since is not None:
                self._waited(worker, now)
        report.seconds, report.ledger = now, self._store.ledger()


def _group_means(claim: Claim) -> list[float]:
    lengths = np.diff(claim.cu_seqlens) - claim.prompt_lengths
    return [float(part.mean()) for part in np.split(lengths, claim.group_starts()[1:])]
