"""One simulated run: the real store in memory and the real scheduler, with everything else as events on a clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from pmdflow.metrics.order import AdmissionOrder, Claimed
from pmdflow.run.refills import Refills
from pmdflow.run.scheduler import decide, must_regrant, next_quota, oldest_beside, serve
from pmdflow.run.simulation.answers import Answers
from pmdflow.run.simulation.report import SimulatedIteration, SimulationReport, group_means
from pmdflow.run.simulation.settings import NoSignalLeft, SimulationSettings
from pmdflow.run.simulation.worker import Worker
from pmdflow.store import StoreFull
from pmdflow.store.facade import TrajectoryStore
from pmdflow.store.segments import encode_segments
from pmdflow.types import Mask, Outcome, Prompt

LEASE_TTL_S = 1e9
"""Leases of live actors never expire: a simulated one appends when sequences end, not several times a second."""
ASKED_EVERY = 64
"""Events between two questions whether to go on."""
TICK_S = 1.0
"""How soon rollout actors are sent to other versions once one of them has too little to generate."""


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
        self._answers = Answers(settings, self._rng)
        self._store = TrajectoryStore(
            None,
            groups_per_iteration=settings.scheduler.groups_per_iteration,
            lookahead=settings.scheduler.lookahead,
            max_staleness=settings.max_staleness,
            window=settings.window,
            signal=None if settings.refill_limit is None else (0.0, 1.0),
            one_version=settings.one_version,
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
        limit = settings.refill_limit
        self._refills = Refills(most=None if limit is None else limit * settings.scheduler.groups_per_iteration)
        self._order = AdmissionOrder()
        self._free_since: float | None = 0.0
        """Since when the learner has waited for a claim; None while it trains."""
        self._held_back: SimulatedIteration | None = None
        """What is trained, and is published once an old version has drained."""
        self._assigning = False
        """Rollout actors are about to be sent to other versions."""

    def run(self, *, max_events: int = 50_000_000, give_up: Callable[[], bool] = lambda: False) -> SimulationReport:
        """Run to the end.

        Raises:
            TimeoutError: `give_up`, which is asked now and then, said so.
            RuntimeError: nothing happens any more, or it was not over after `max_events`.
            NoSignalLeft: no group has a signal.
            PmdflowError: the policy says what cannot be.
        """
        self._store.publish(0, None, {})
        self._grant()
        self._admit()
        self._waiting = dict.fromkeys(range(len(self._workers)))
        for worker in self._workers:
            worker.waits_since, worker.cause = 0.0, "start"
        self._wake(0.0)
        now, events = 0.0, 0
        while not self._is_over():
            if not self._events or events >= max_events:
                raise RuntimeError(f"not over after {events} events and {now:g} s: {self._store.counts()}")
            now, _, happen = heapq.heappop(self._events)
            happen(now)
            events += 1
            if events % ASKED_EVERY == 0 and give_up():
                raise TimeoutError(f"not over after {events} events")
        self._finish(now)
        return self._report

    @property
    def _is_closing(self) -> bool:
        return len(self._report.iterations) >= self._settings.iterations

    def _is_over(self) -> bool:
        return self._is_closing and not (self._settings.drain and self._store.counts().groups_untrained)

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
        spent = self._store.versions_spent()
        if self._settings.one_version:  # an older version finishes what it began, whatever its budget was
            spent = {self._version: spent[self._version]}
        over = [tokens - self._budgets[version] for version, tokens in spent.items()]
        self._report.overspent_tokens = max([self._report.overspent_tokens, *over])

    def _admit(self) -> int:
        counts = self._store.counts()
        decision = decide(self._budgeted, counts)
        room = decision.room(counts)
        number = 0 if self._is_closing else self._refills.allowed(room, counts)
        tokens = np.zeros(self._settings.prompt_tokens, np.int32)
        groups: list[int] = []
        for cursor in range(counts.next_cursor, counts.next_cursor + number):
            try:
                group = self._store.admit(
                    f"train-{cursor}",
                    Prompt(id=str(cursor), text="", tokens=tokens),
                    cursor=cursor,
                    group_size=self._settings.group_size,
                    max_tokens=self._settings.max_tokens,
                    priority=decision.priority,
                )
            except StoreFull:  # the quota was granted by another decision
                break
            groups.append(group)
        if number:
            self._refills.took(len(groups), room)
        self._order.admitted(groups, iteration=len(self._report.iterations) + 1)
        report = self._report
        report.max_groups_untrained = max(report.max_groups_untrained, counts.groups_untrained + len(groups))
        return len(groups)

    # Rollout.

    def _wake(self, now: float) -> None:
        """Let workers that wait look for leases, until one finds none."""
        for index in list(self._waiting):
            if not self._lease(index, now) and not self._settings.one_version:
                return

    def _lease(self, index: int, now: float, *, delay_s: float = 0.0) -> bool:
        """Fill a worker's free slots and let it go on; whether it has something to generate."""
        worker = self._workers[index]
        free = worker.engine.slots - len(worker.running)
        for lease in self._store.lease(worker.name, worker.version, free, 0.0, now_s=now) if free else ():
            delay_s += worker.join(lease, length=self._answers.length(lease.trajectory, lease.group))
        if self._settings.one_version and len(worker.running) < worker.engine.slots and not self._assigning:
            self._assigning = True
            self._at(now + TICK_S, self._assign)
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
            return "other versions" if self._settings.one_version else "budget"
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
        self._publish_held_back(now)

    def _replace(self, index: int, now: float) -> None:
        """Another worker takes the place of a dead one, whose leases end."""
        worker = self._workers[index]
        self._store.fence(worker.name)
        worker.name += "'"
        worker.version, worker.lost = self._version, False
        if not self._lease(index, now):
            self._claim(now)
        self._wake(now)
        self._publish_held_back(now)

    def _append(
        self, worker: Worker, trajectories: list[int], *, next_version: int, now: float, release: bool = False
    ) -> None:
        if not trajectories:
            return
        most = self._settings.max_tokens
        segments = list(worker.segments(trajectories, next_version=next_version, max_tokens=most, release=release))
        _, grants = self._store.append(encode_segments(segments), now_s=now)
        ended = 0
        for segment, grant in zip(segments, grants, strict=True):
            worker.answered(segment, grant, prompt_tokens=self._settings.prompt_tokens)
            if segment.stop not in (None, "budget", "abort") and not grant.stale:
                self._answers.end(segment.trajectory)
                ended += 1
        if ended:
            self._at(now + self._settings.score_s, self._score)

    def _offer(self, version: int, now: float) -> None:
        """A version reaches every worker: it ends segments, not leases; or those that are sent to it."""
        if self._settings.one_version:
            self._assign(now)
            self._wake(now)  # what an old version has left has no budget any more
            return
        for index, worker in enumerate(self._workers):
            if worker.lost:
                continue
            if worker.running:
                worker.advance(now)
            self._append(worker, list(worker.running), next_version=version, now=now)
            worker.version = version
            self._lease(index, now, delay_s=worker.engine.apply_s)
        self._check_budgets()

    def _assign(self, now: float) -> None:
        """Send workers to the versions that need them; they give back what they hold of another."""
        self._assigning = False
        serving = {str(index): worker.version for index, worker in enumerate(self._workers) if not worker.lost}
        slots = self._settings.engine.slots
        then = serve(self._store.in_flight(), serving, newest=self._version, slots=slots)
        moved = [int(name) for name, version in then.items() if version != serving[name]]
        for index in moved:
            worker = self._workers[index]
            worker.advance(now)
            self._append(worker, list(worker.running), next_version=worker.version, now=now, release=True)
            worker.version = then[str(index)]
            worker.serial += 1
        for index in moved:
            self._lease(index, now, delay_s=self._settings.engine.apply_s)
        if moved:
            self._wake(now)
            self._publish_held_back(now)

    def _score(self, now: float) -> None:
        for item in self._store.unscored(1 << 20, 1.0, 0.0, now_s=now):
            failed = self._settings.infra_failure_share and self._rng.random() < self._settings.infra_failure_share
            outcome: Outcome = "infra_failure" if failed else "scored"
            self._store.score(item.trajectory, item.attempt, outcome, self._answers.reward(item.group), {}, now_s=now)
            if failed:
                self._at(now + self._settings.score_s, self._score)
        self._claim(now)

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
        counts = self._store.counts()
        room = decide(self._budgeted, counts).room(counts)
        if counts.groups_untrained == 0 and not self._is_closing and not self._refills.allowed(room, counts):
            raise NoSignalLeft(f"no group is left to train after {counts.groups_no_signal} without a signal")
        admitted = self._admit()
        if must_regrant(answer, admitted=admitted):
            self._report.regrants += 1
            self._grant()
        self._wake(now)
        self._at(now, self._claim)

    def _train(self, iteration: int, now: float) -> None:
        assert self._free_since is not None
        wait_s, self._free_since = now - self._free_since, None
        claim = self._store.read_rows(iteration)
        seen = Claimed.of(claim)
        values = dict(seen.metrics)
        self._report.mixed_version += values["trajectory/mixed_version"]
        order = self._order.claimed(seen, oldest_untrained=self._store.counts().oldest_untrained)
        lengths = group_means(claim)
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
            ages={int(age): tokens for age, tokens in values["staleness/tokens"].items()},
            passed=order["trajectory/bypasses_max"] or 0,
        )
        self._at(done.end_s, partial(self._publish, done))
        for index in self._waiting:
            self._waited(self._workers[index], now)
            self._workers[index].waits_since, self._workers[index].cause = now, self._cause()

    def _publish_held_back(self, now: float) -> None:
        held_back, self._held_back = self._held_back, None
        if held_back is not None:
            self._publish(replace(held_back, end_s=now), now)

    def _publish(self, done: SimulatedIteration, now: float) -> None:
        oldest = oldest_beside(decide(self._settings.scheduler, self._store.counts()), self._version + 1)
        if self._settings.one_version and min(self._store.in_flight(), default=oldest) < oldest:
            self._held_back = done
            return
        self._check_budgets()
        iteration = len(self._report.iterations) + 1
        self._version += 1
        self._store.publish(self._version, iteration, {})
        self._rate()
        self._budgeted = self._settings.scheduler.budgeted(self._rates)
        self._grant()
        self._store.commit(iteration)
        self._store.evict(iteration)
        self._report.iterations.append(done)
        self._free_since = now
        self._refills.renew()
        self._admit()
        self._report.max_versions = max(self._report.max_versions, len({self._version, *self._store.in_flight()}))
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
        report.groups_left = self._store.counts().groups_untrained
