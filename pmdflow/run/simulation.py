"""The same store and scheduler under a virtual clock with simulated actors, for tests and planning."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pmdflow.run.scheduler import SchedulerSettings, must_regrant, next_quota
from pmdflow.store.facade import TrajectoryStore
from pmdflow.store.segments import encode_segments
from pmdflow.types import Lease, Mask, Outcome, Prompt, Segment, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """A workload and a machine."""

    scheduler: SchedulerSettings
    max_staleness: int | None
    iterations: int
    group_size: int
    max_tokens: int
    """Generated tokens of one trajectory at most."""
    mean_tokens: float
    """Mean of the lognormal trajectory length."""
    actors: int = 1
    slots: int = 16
    """Sequences that one rollout actor generates at a time."""
    tokens_per_tick: int = 8
    """Tokens that a sequence generates in one tick of the virtual clock."""
    train_ticks: int = 4
    """Ticks that the learner needs for a claim."""
    lost_share: float = 0.0
    """Share of ticks in which a rollout actor dies and leaves its leases to expire."""
    infra_failure_share: float = 0.0
    """Share of scoring attempts that fail."""
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class SimulationReport:
    """What a simulated run did; tokens are generated tokens."""

    ticks: int = 0
    iterations: int = 0
    regrants: int = 0
    learner_wait_ticks: int = 0
    trained_tokens: int = 0
    max_trained_staleness: int = 0
    max_groups_untrained: int = 0
    overspent_tokens: int = 0
    """Most by which a version's tokens exceeded its budget; 0 is the rule."""
    ledger: dict[str, int] = field(default_factory=dict)


class Simulation:
    """One simulated run over an in-memory store.

    Example:
        >>> scheduler = SchedulerSettings(
        ...     groups_per_iteration=2, tokens_per_iteration=200, tokens_per_segment=20, lookahead=1)
        >>> settings = SimulationSettings(
        ...     scheduler=scheduler, max_staleness=4, iterations=3, group_size=2, max_tokens=60, mean_tokens=20.0)
        >>> Simulation(settings).run(max_ticks=10_000).iterations
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
            min_group_size=min(2, settings.group_size),
            lease_ttl_s=5.0,
        )
        self._report = SimulationReport()
        self._now = 0.0
        self._version = 0
        self._lengths: dict[int, int] = {}
        self._running: list[dict[int, tuple[Lease, int, int]]] = [{} for _ in range(settings.actors)]
        """By actor and trajectory: the lease, tokens appended, tokens granted beyond them."""
        self._training_until: float | None = None
        self._store.publish(0, None, {})
        self._store.set_quota(next_quota(settings.scheduler, self._store.counts()))

    def run(self, *, max_ticks: int) -> SimulationReport:
        """Run to the end.

        Raises:
            RuntimeError: it was not over after `max_ticks`.
        """
        while self._report.iterations < self._settings.iterations:
            if self._report.ticks >= max_ticks:
                raise RuntimeError(f"not over after {max_ticks} ticks: {self._store.counts()}")
            self._report.ticks += 1
            self._now += 1.0
            self._admit()
            for actor in range(self._settings.actors):
                self._rollout(actor)
            self._score()
            self._learn()
        self._report.ledger = self._store.ledger()
        return self._report

    def _admit(self) -> int:
        counts = self._store.counts()
        room = self._settings.scheduler.room(counts)
        for cursor in range(counts.next_cursor, counts.next_cursor + room):
            prompt = Prompt(id=f"p{cursor}", text="", tokens=np.arange(3, dtype=np.int32))
            self._store.admit(
                f"train-{cursor}",
                cursor=cursor,
                kind="train",
                prompt=prompt,
                group_size=self._settings.group_size,
                max_tokens=self._settings.max_tokens,
            )
        untrained = self._store.counts().groups_untrained
        self._report.max_groups_untrained = max(self._report.max_groups_untrained, untrained)
        return room

    def _rollout(self, actor: int) -> None:
        running = self._running[actor]
        if self._rng.random() < self._settings.lost_share:
            running.clear()
            return
        free = self._settings.slots - len(running)
        for lease in self._store.lease(f"rollout-{actor}", self._version, free, 0.0, now_s=self._now):
            running[lease.trajectory] = (lease, len(lease.prefix), lease.grant)
        if not running:
            return
        segments = [self._generate(*entry) for entry in running.values()]
        _, grants = self._store.append(encode_segments(segments), now_s=self._now)
        for segment, grant in zip(segments, grants, strict=True):
            if grant.stale or segment.stop is not None:
                del running[segment.trajectory]
            else:
                lease = running[segment.trajectory][0]
                running[segment.trajectory] = (lease, segment.offset + len(segment.tokens), grant.tokens)
        for version, spent in self._store.versions_spent().items():
            if version == self._version:
                over = spent - self._store.counts().tokens_budget
                self._report.overspent_tokens = max(self._report.overspent_tokens, over)

    def _generate(self, lease: Lease, offset: int, grant: int) -> Segment:
        length = self._length(lease.trajectory)
        number = max(min(self._settings.tokens_per_tick, grant, length - offset), 0)
        stop: StopReason | None = None
        if offset + number >= length:
            stop = "length" if length == self._settings.max_tokens else "stop"
        elif number == 0:
            stop = "budget"
        return Segment(
            trajectory=lease.trajectory,
            epoch=lease.epoch,
            offset=offset,
            version=self._version,
            temperature=1.0,
            tokens=np.full(number, 7, dtype=np.int32),
            logprobs=np.full(number, -1.0, dtype=np.float32),
            next_version=self._version,
            stop=stop,
        )

    def _length(self, trajectory: int) -> int:
        if trajectory not in self._lengths:
            sigma = 0.8
            mean = self._settings.mean_tokens
            drawn = self._rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)
            self._lengths[trajectory] = int(np.clip(drawn, 1, self._settings.max_tokens))
        return self._lengths[trajectory]

    def _score(self) -> None:
        for item in self._store.unscored(1024, 1.0, 0.0, now_s=self._now):
            failed = self._rng.random() < self._settings.infra_failure_share
            outcome: Outcome = "infra_failure" if failed else "scored"
            self._store.score(item.trajectory, item.attempt, outcome, float(self._rng.integers(2)), {}, now_s=self._now)

    def _learn(self) -> None:
        iteration = self._report.iterations + 1
        if self._training_until is None:
            answer = self._store.claim(iteration, self._version, 0.0, now_s=self._now)
            if answer.status == "claimed":
                self._training_until = self._now + self._settings.train_ticks
                self._account(iteration)
                return
            self._report.learner_wait_ticks += 1
            admitted = self._admit() if answer.status == "starved" else 0
            if must_regrant(answer, admitted=admitted):
                self._report.regrants += 1
                self._store.set_quota(next_quota(self._settings.scheduler, self._store.counts()))
        elif self._now >= self._training_until:
            self._training_until = None
            self._version += 1
            self._store.publish(self._version, iteration, {})
            self._store.set_quota(next_quota(self._settings.scheduler, self._store.counts()))
            self._store.commit(iteration)
            self._store.evict(iteration)
            self._report.iterations = iteration

    def _account(self, iteration: int) -> None:
        batch = self._store.read_claim(iteration)
        trained = (batch.mask & Mask.TRAINED) != 0
        self._report.trained_tokens += int(trained.sum())
        if trained.any():
            oldest = batch.version - int(batch.versions[trained].min())
            self._report.max_trained_staleness = max(self._report.max_trained_staleness, oldest)
