"""The controller: the main loop, one iteration a turn. It owns the iteration number and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from ray import ObjectRef
from ray.actor import ActorHandle

from pmdflow.config.schema import Config
from pmdflow.data.mixture import MixedPrompts
from pmdflow.errors import ActorDied, LearnerDied, PmdflowError, WaitTimeout
from pmdflow.learner.actor import LearnerActor
from pmdflow.learner.result import TrainResult
from pmdflow.metrics.history import iterations
from pmdflow.metrics.order import AdmissionOrder, Claimed
from pmdflow.run.checkpoints import Checkpoints
from pmdflow.run.devices import Devices
from pmdflow.run.discards import take_up
from pmdflow.run.held_out import HeldOut
from pmdflow.run.learner_group import LearnerGroup
from pmdflow.run.progress import Progress
from pmdflow.run.refills import Refills
from pmdflow.run.scheduler import SchedulerSettings, decide, must_regrant, next_quota, oldest_beside
from pmdflow.run.supervision import Supervisor
from pmdflow.run.telemetry import store_values
from pmdflow.store.actor import StoreActor
from pmdflow.store.answers import ClaimAnswer
from pmdflow.store.archive.actor import ArchiveActor
from pmdflow.store.client import call
from pmdflow.types import Counts
from pmdflow.weights.transport import WeightsHandle

CAPACITY = "rollout/capacity_tokens_per_s"
CLAIM_WAIT_S = 1.0
STEP_TIMEOUT_S = 7200.0
RECOVERIES = 3
"""Tries to bring the learner back, before whatever kills it is what ends the run."""
APPLY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0


class Controller:
    """Opens iterations, asks the scheduler, and moves claims to the learner and weights to the rollout actors."""

    def __init__(
        self,
        *,
        config: Config,
        run_dir: Path,
        supervisor: Supervisor,
        prompts: MixedPrompts,
        learners: LearnerGroup,
        start_archive: Callable[[], ActorHandle[ArchiveActor]],
    ) -> None:
        """Wire the parts; `start_archive` creates the actor that writes parts."""
        self._config = config
        self._run_dir = run_dir
        self._supervisor = supervisor
        self._telemetry = supervisor.telemetry
        self._store = supervisor.store
        self._prompts = prompts
        self._settings = self._budgeted = SchedulerSettings.of(config)
        self._rates: list[float] = []
        """Tokens a second that rollout could generate, by iteration: what an automatic budget follows from."""
        self._learners = learners
        self._checkpoints = Checkpoints(
            config=config,
            run_dir=run_dir,
            supervisor=supervisor,
            learners=self._learners,
            start_archive=start_archive,
        )
        self._devices = Devices(config, supervisor=supervisor, learners=self._learners)
        scheduler = config.scheduler
        most = scheduler.refill_limit * scheduler.groups_per_iteration
        self._refills = Refills(most=most if scheduler.refill else None)
        self._order = AdmissionOrder()
        self._held_out = HeldOut(config=config, supervisor=supervisor, prompts=prompts, run_dir=run_dir)
        self.iteration = 0
        """Iterations trained in the surviving history."""
        self.version = 0
        """Newest published policy version."""

    def run(self) -> None:
        """Train until `run.iterations` are done or a drain is asked for, then leave everything durable.

        Consumes: ready groups. Produces: policy versions, checkpoints, archive parts. Waits for: claims, learner
        steps. Unblocked by: the score that makes a group ready, an exhausted budget, a drain.

        Raises:
            LearnerDied: twice in the same iteration, so that a third time would be the same.
        """
        self.recover()
        died_after = -1
        while self.iteration < self._config.run.iterations and not self._supervisor.draining:
            try:
                self._iterate()
            except LearnerDied as error:
                if died_after == self.iteration:
                    raise
                died_after = self.iteration
                self._recover_from(error)
        if self._checkpoints.saved_iteration < self.iteration:
            self._devices.to_learner()
            self._checkpoints.save(iteration=self.iteration, version=self.version)
            self._devices.to_engines()
        self._checkpoints.commit()
        if not self._supervisor.draining:
            self._held_out.finish()
        self._supervisor.stop_loops(timeout_s=STOP_TIMEOUT_S)
        self._checkpoints.await_archive()
        self._telemetry.sample(*self._sample())

    def _recover_from(self, error: LearnerDied) -> None:
        """Recover, again if a rank dies meanwhile: a machine that is lost may take some with it that had just begun."""
        for left in reversed(range(RECOVERIES)):
            self._telemetry.event("actor_died", f"{error}; the learner restarts from the newest checkpoint")
            try:
                self.recover()
                return
            except LearnerDied as again:
                if not left:
                    raise
                error = again

    def recover(self) -> None:
        """Put learner and store at the newest checkpoint: later claims are undone, to be made and trained again."""
        self._held_out.pause()
        self._supervisor.stop_learners()  # whoever is dead is not to be told of again while others are waited for
        manifest = self._checkpoints.recover()
        self._devices.rest_engines()
        self._learners.restart()
        if manifest is None:
            self._learners.wait(self._learners.call(LearnerActor.load_initial), what="loading the initial weights")
        else:
            directory = str(manifest.directory)
            self._learners.wait(self._learners.call(LearnerActor.load, directory), what=f"loading {directory}")
        self.iteration = 0 if manifest is None else manifest.iteration
        self.version = 0 if manifest is None else manifest.version
        undone = self._supervisor.get(
            call(self._store, StoreActor.uncommit, self.iteration), what="undoing the claims after the checkpoint"
        )
        if self.iteration:
            self._supervisor.get(call(self._store, StoreActor.commit, self.iteration), what="committing claims")
            self._telemetry.event(
                "resume",
                f"continuing after iteration {self.iteration}; {len(undone)} later claims will be trained again",
            )
        before = iterations(self._run_dir)
        rates = [before[number].get(CAPACITY) for number in sorted(before) if number <= self.iteration]
        self._rates = [rate for rate in rates if rate is not None]
        self._take_discards()
        self._reopen_version()
        self._devices.to_engines()
        self._held_out.start(self.iteration, self.version)
        self._checkpoints.archive()

    def _take_discards(self) -> None:
        """Discard what an operator asked for; called where no claim is being trained."""

        def discard(group: int, reason: str) -> str:
            asked = call(self._store, StoreActor.discard, group, reason)
            return self._supervisor.get(asked, what="discarding a group")

        take_up(self._run_dir, discard, partial(self._telemetry.event, "discard"))

    def _reopen_version(self) -> None:
        """Version numbers are never reused: weights older than the newest number get the next one."""
        newest, restored = self._counts().max_version, self.version
        if newest > restored:
            self.version = newest + 1
            made = call(self._store, StoreActor.restore, self.version, restored)
            self._supervisor.get(made, what="publishing")
        elif newest < restored:
            self._supervisor.get(call(self._store, StoreActor.publish, restored, None, {}), what="publishing")
        self._grant_first_budget()
        if self.version > 0 or self._settings.versions is not None:  # then an actor may come back to version 0
            self._supervisor.offer_weights(self._publish_weights(), timeout_s=APPLY_TIMEOUT_S)

    def _iterate(self) -> None:
        """One claim, trained and published; nothing if a drain came first."""
        started = time.time()
        iteration = self.iteration + 1
        self._take_discards()
        self._admit()
        if not self._claim(iteration):
            return
        self._held_out.claimed()
        claimed = time.time()
        self._devices.to_learner()
        claim_ref = call(self._store, StoreActor.read_rows, iteration)
        # Ray resolves a reference in the place of an argument.
        refs: list[ObjectRef[TrainResult]] = [
            learner.train.remote(claim_ref, self._store) for learner in self._supervisor.learners
        ]
        looked = call(self._store, StoreActor.look_at, cast("Any", claim_ref))
        results = self._learners.wait(refs, what=f"training iteration {iteration}", timeout_s=STEP_TIMEOUT_S)
        trained = time.time()
        self._checkpoints.commit()
        committed = time.time()
        spent = self._counts()
        self._publish(iteration, results[0].left_out)
        self.iteration = iteration
        self._held_out.published(iteration, self.version)
        self._refills.renew()
        self._admit_ahead()
        published = time.time()
        if iteration % self._config.learner.checkpoint_every == 0:
            self._checkpoints.save(iteration=iteration, version=self.version)
        self._devices.to_engines()
        claim = self._supervisor.get(looked, what="looking at the claim", timeout_s=APPLY_TIMEOUT_S)
        times = {
            "time/claim_wait_s": claimed - started,
            "time/train_s": trained - claimed,
            "time/publish_s": published - committed,
            "time/checkpoint_s": committed - trained + time.time() - published,
            "time/iteration_s": time.time() - started,
        }
        self._record(claim, {**results[0].metrics, **results[0].speed}, spent, times)

    def _admit_ahead(self) -> None:
        """Admit at once what a new version has room for: checkpoint, evaluation and metrics come after that.

        What the store refuses here, since no checkpoint covers this iteration yet, is admitted when the next one opens.
        """
        if self.iteration < self._config.run.iterations and not self._supervisor.draining:
            self._admit_room(self._counts())

    def _admit(self) -> int:
        """Admit prompts up to the quota; only admission is ever refused, so a full store admits fewer."""
        counts = self._counts()
        admitted = self._admit_room(counts)
        if admitted == 0 and counts.groups_untrained == 0 and self._checkpoints.is_saving:
            self._checkpoints.commit()
            self._checkpoints.await_archive()
            return self._admit()
        if admitted == 0 and counts.groups_untrained == 0:
            raise PmdflowError(
                "the store admits no group although none is waiting: store.max_bytes "
                f"({self._config.store.max_bytes}) is filled by groups that no checkpoint covers yet",
                hint="raise store.max_bytes",
            )
        return admitted

    def _admit_room(self, counts: Counts) -> int:
        self._learn_successes()
        decision = decide(self._budgeted, counts)
        room = decision.room(counts)
        cursors = range(counts.next_cursor, counts.next_cursor + self._refills.allowed(room, counts))
        try:
            batch = [(f"train-{cursor}", cursor, self._prompts.prompt(cursor)) for cursor in cursors]
        except ValueError as error:  # of a generated prompt, or a template: no start could see every one
            raise PmdflowError(str(error)) from error
        size, longest = self._config.data.group_size, self._config.data.max_tokens
        answer = call(self._store, StoreActor.admit, batch, "train", size, longest, decision.priority)
        groups = self._supervisor.get(answer, what="admitting prompts")
        self._refills.took(len(groups), room)
        self._order.admitted(groups, iteration=self.iteration + 1)
        return len(groups)

    def _learn_successes(self) -> None:
        """Tell the prompts how well they are answered, where that decides what is drawn."""
        curriculum = self._prompts.curriculum
        if curriculum is not None:
            newer = call(self._store, StoreActor.successes, curriculum.number)
            curriculum.learn(self._supervisor.get(newer, what="the rates of success"))

    def _claim(self, iteration: int) -> bool:
        """Wait for the iteration's groups; False if a drain came first."""
        progress = Progress(f"iteration {iteration} waited for a ready group")
        start = time.time()
        while not self._supervisor.draining:
            asked = call(self._store, StoreActor.claim, iteration, self.version, CLAIM_WAIT_S)
            answer = self._supervisor.get(asked, what="claiming the iteration's groups")
            if answer.status == "claimed":
                self._telemetry.waited("wait_groups", start)
                return True
            counts = self._counts()
            self._unblock(answer, counts)
            self._take_discards()
            progress.require(counts)
        return False

    def _unblock(self, answer: ClaimAnswer, counts: Counts) -> None:
        """Let rollout go on where a claim starves: by new groups, or by the same budget once more."""
        if answer.status != "starved":
            return
        room = decide(self._budgeted, counts).room(counts)
        if self._refills.allowed(room, counts) == 0 and counts.groups_untrained == 0:
            raise PmdflowError(
                f"no group is left to train: {counts.groups_no_signal} were evicted since the start because their "
                f"rewards lie outside of learner.keep_groups_above ({self._config.learner.keep_groups_above}) and "
                f"keep_groups_below ({self._config.learner.keep_groups_below}), and scheduler.refill_limit "
                f"({self._config.scheduler.refill_limit}) is reached",
                hint="look at the rewards: the task is solved, too hard, or its reward function is wrong",
            )
        admitted = self._admit()
        if answer.reason == "over_age":
            self._telemetry.event(
                "over_age",
                f"version {self.version}: ready groups had nothing left to train and were evicted; "
                f"{admitted} others admitted",
            )
        if must_regrant(answer, admitted=admitted):
            self._grant(counts)
            self._telemetry.event(
                "budget_regranted",
                f"version {self.version}: {counts.tokens_spent} tokens spent without a ready group",
            )

    def _publish(self, iteration: int, left_out: dict[str, list[int]]) -> None:
        """The next version: its weights whole, its number in the store, its budget granted, then the actors told."""
        self._await_drained(self.version + 1)
        self.version += 1
        handle = self._publish_weights()
        published = call(self._store, StoreActor.publish, self.version, iteration, left_out)
        self._supervisor.get(published, what="publishing")
        self._grant_first_budget()
        self._supervisor.offer_weights(handle, timeout_s=APPLY_TIMEOUT_S)

    def _await_drained(self, version: int) -> None:
        """With one version a trajectory: wait until so few versions are in flight that another may be published.

        Waits for: the last trajectories of the oldest one. Unblocked by: their ends; a drain of the run waits too.
        """
        if self._settings.versions is None:
            return
        oldest = oldest_beside(decide(self._settings, self._counts()), version)
        progress = Progress(f"version {version} waited for trajectories of versions before {oldest} to be complete")
        while oldest > 0:
            asked = call(self._store, StoreActor.wait_drained, oldest, CLAIM_WAIT_S)
            if self._supervisor.get(asked, what="the oldest policy version to drain"):
                return
            progress.require(self._counts())

    def _publish_weights(self) -> WeightsHandle:
        """Publish; if that fails at living ranks, such as for want of memory, once more: they have failed in step."""

        def publish() -> WeightsHandle:
            refs = self._learners.call(LearnerActor.publish, self.version)
            return self._learners.wait(refs, what=f"publishing version {self.version}")[0]

        try:
            return publish()
        except (ActorDied, WaitTimeout):
            raise
        except PmdflowError as error:
            self._telemetry.event("publication_failed", f"{error}; once more")
            return publish()

    def _grant_first_budget(self) -> None:
        counts = self._counts()
        self._budgeted = self._settings.budgeted(self._rates)
        if counts.tokens_budget == 0:
            self._grant(counts)

    def _grant(self, counts: Counts) -> None:
        quota = next_quota(self._budgeted, counts)
        self._supervisor.get(call(self._store, StoreActor.set_quota, quota), what="granting a budget")

    def _counts(self) -> Counts:
        return self._supervisor.get(call(self._store, StoreActor.counts), what="the store's counts")

    def _sample(self) -> tuple[Counts, dict[str, int]]:
        return self._supervisor.get(call(self._store, StoreActor.sample), what="the store's counts")

    def _record(self, claim: Claimed, metrics: Mapping[str, object], spent: Counts, times: Mapping[str, float]) -> None:
        counts, ledger = self._sample()
        interval = self._telemetry.take_interval()
        capacity = interval.capacity(actors=len(self._supervisor.rollouts))
        if capacity is not None:
            self._rates.append(capacity)
        self._telemetry.iteration(
            {
                **store_values(counts, ledger),
                "iteration": self.iteration,
                "version": self.version,
                **claim.metrics,
                **self._order.claimed(claim, oldest_untrained=counts.oldest_untrained),
                **metrics,
                "scheduler/tokens_budget": spent.tokens_budget,
                "scheduler/tokens_spent": spent.tokens_spent,
                "rollout/tokens_per_s": interval.tokens["generated_tokens"] / times["time/iteration_s"],
                "rollout/busy_share": interval.busy_share,
                CAPACITY: capacity,
                "rollout/reprefill_tokens": ledger["reprefill"],
                **interval.engine_metrics(speculates=self._config.rollout.speculation is not None),
                **({} if self._prompts.curriculum is None else self._prompts.curriculum.metrics()),
                **times,
            }
        )
