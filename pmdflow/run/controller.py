"""The controller: the main loop, one iteration a turn. It owns the iteration number and nothing else."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pmdflow.config.schema import Config
from pmdflow.data.prompts import PromptSource
from pmdflow.errors import ActorDied, LearnerDied, PmdflowError, WaitTimeout
from pmdflow.learner.checkpoint.manifest import Manifest, commit_checkpoint, newest_manifest, oldest_manifest, prune
from pmdflow.metrics.claim import claim_metrics
from pmdflow.run.held_out import Evaluation
from pmdflow.run.scheduler import SchedulerSettings, next_quota
from pmdflow.run.supervision import Supervisor, store_values
from pmdflow.types import Counts, TrainBatch

CLAIM_WAIT_S = 1.0
STALL_TIMEOUT_S = 900.0
"""A claim is given up when nothing was written to the store for this long."""
STEP_TIMEOUT_S = 7200.0
APPLY_TIMEOUT_S = 300.0


class Controller:
    """Opens iterations, asks the scheduler, and moves claims to the learner and weights to the rollout actors."""

    def __init__(
        self,
        *,
        config: Config,
        run_dir: Path,
        supervisor: Supervisor,
        prompts: PromptSource,
        start_learners: Callable[[], list[Any]],
    ) -> None:
        """Wire the parts; `start_learners` creates one actor a rank."""
        self._config = config
        self._run_dir = run_dir
        self._supervisor = supervisor
        self._store = supervisor.store
        self._prompts = prompts
        self._start_learners = start_learners
        self._settings = SchedulerSettings.of(config)
        self._evaluation = Evaluation(config=config, supervisor=supervisor, prompts=prompts)
        self._archive_ref: Any = None
        self._saving: tuple[Manifest, list[Any]] | None = None
        """The checkpoint whose files are being written, and what the ranks answer when they are whole."""
        self._checkpointed = 0
        # Newest iteration whose checkpoint is committed or being written."""
        self._tokens_before: Counter[str] = Counter()
        self.iteration = 0
        """Iterations trained in the surviving history."""
        self.version = 0

    def run(self) -> None:
        """Train until `run.iterations` are done or a drain is asked for, then leave everything durable.

        Consumes: ready groups. Produces: policy versions, checkpoints, archive parts. Waits for: claims, learner
        steps. Unblocked by: the score that makes a group ready, an exhausted budget, a drain.

        Raises:
            LearnerDied: twice in the same iteration, so that a third time would be the same.
        """
        self.recover()
        self._evaluation.start(self.iteration)
        died_after = -1
        while self.iteration < self._config.run.iterations and not self._supervisor.draining:
            try:
                self._iterate()
            except LearnerDied as error:
                if died_after == self.iteration:
                    raise
                died_after = self.iteration
                self._supervisor.event("actor_died", f"{error}; the learner restarts from the newest checkpoint")
                self.recover()
        if self._checkpointed < self.iteration:
            self._checkpoint()
        self._commit_checkpoint()
        if not self._supervisor.draining:
            self._evaluation.finish(self.iteration)
        self._supervisor.stop_loops(timeout_s=30.0)
        self._await_archive()
        self._supervisor.recorder.metric("sample", store_values(*self._call("sample")))

    def recover(self) -> None:
        """Put learner and store at the newest checkpoint: later claims are undone, their groups ready again."""
        supervisor, manifest = self._supervisor, newest_manifest(self._run_dir / "checkpoints")
        self._saving = None
        supervisor.stop_learners()
        supervisor.learners = self._start_learners()
        if manifest is None:
            self._learners("load_initial", what="loading the initial weights")
        else:
            self._learners("load", str(manifest.directory), what=f"loading {manifest.directory}")
        self.iteration = self._checkpointed = 0 if manifest is None else manifest.iteration
        self.version = 0 if manifest is None else manifest.version
        undone = self._call("uncommit", self.iteration)
        if self.iteration:
            self._call("commit", self.iteration)
            supervisor.event(
                "resume",
                f"continuing after iteration {self.iteration}; {len(undone)} later claims will be trained again",
            )
        self._reopen_version()
        self._archive()

    def _reopen_version(self) -> None:
        """Version numbers are never reused: weights older than the newest number get the next one."""
        counts: Counts = self._call("counts")
        if counts.max_version > self.version:
            self.version = counts.max_version + 1
        if counts.max_version != self.version:
            self._call("publish", self.version, None, {})
        self._grant_first_budget()
        if self.version > 0:
            self._supervisor.offer_weights(self._publish_weights(), timeout_s=APPLY_TIMEOUT_S)

    def _iterate(self) -> None:
        started = time.time()
        iteration = self.iteration + 1
        self._admit()
        if not self._claim(iteration):
            return
        claimed = time.time()
        batch_ref = self._store.read_claim.remote(iteration)
        result = self._learners("train", batch_ref, what=f"training iteration {iteration}", timeout_s=STEP_TIMEOUT_S)[0]
        trained = time.time()
        self._commit_checkpoint()
        committed = time.time()
        spent: Counts = self._call("counts")
        self._publish(iteration, result.left_out)
        published = time.time()
        self.iteration = iteration
        if iteration % self._config.learner.checkpoint_every == 0:
            self._checkpoint()
        self._evaluation.turn(iteration)
        batch = self._supervisor.wait([batch_ref], what="reading the claim", timeout_s=APPLY_TIMEOUT_S)[0]
        times = {
            "time/claim_wait_s": claimed - started,
            "time/train_s": trained - claimed,
            "time/publish_s": published - committed,
            "time/checkpoint_s": committed - trained + time.time() - published,
            "time/iteration_s": time.time() - started,
        }
        self._record(batch, {**result.metrics, **result.speed}, spent, times)

    def _admit(self) -> int:
        """Admit prompts up to the quota; only admission is ever refused, so a full store admits fewer."""
        counts: Counts = self._call("counts")
        room = self._settings.groups_per_iteration * (self._settings.lookahead + 1) - counts.groups_untrained
        cursors = range(counts.next_cursor, counts.next_cursor + max(room, 0))
        batch = [(f"train-{cursor}", cursor, self._prompts.prompt(cursor)) for cursor in cursors]
        admitted: int = self._call("admit", batch, "train", self._config.data.group_size, self._config.data.max_tokens)
        if admitted == 0 and counts.groups_untrained == 0 and self._saving is not None:
            self._commit_checkpoint()
            self._await_archive()
            return self._admit()
        if admitted == 0 and counts.groups_untrained == 0:
            raise PmdflowError(
                "the store admits no group although none is waiting: store.max_bytes "
                f"({self._config.store.max_bytes}) is filled by groups that no checkpoint covers yet; raise it"
            )
        return admitted

    def _claim(self, iteration: int) -> bool:
        """Wait for the iteration's groups; False if a drain came first."""
        last_lsn, last_change = -1, time.monotonic()
        start = time.time()
        while not self._supervisor.draining:
            answer = self._call("claim", iteration, self.version, CLAIM_WAIT_S)
            if answer.status == "claimed":
                self._supervisor.recorder.spans(
                    [{"actor": "controller", "name": "wait_groups", "start": start, "end": time.time(), "attrs": {}}]
                )
                return True
            counts: Counts = self._call("counts")
            admitted = self._admit() if answer.status == "starved" else 0
            if answer.reason == "over_age":
                self._supervisor.event(
                    "over_age",
                    f"version {self.version}: ready groups had nothing left to train and were evicted; "
                    f"{admitted} others admitted",
                )
            elif answer.status == "starved" and admitted == 0:
                self._call("set_quota", next_quota(self._settings, counts))
                self._supervisor.event(
                    "budget_regranted",
                    f"version {self.version}: {counts.tokens_spent} tokens spent without a ready group",
                )
            if counts.lsn != last_lsn:
                last_lsn, last_change = counts.lsn, time.monotonic()
            elif time.monotonic() - last_change > STALL_TIMEOUT_S:
                raise WaitTimeout(
                    f"iteration {iteration} waited {STALL_TIMEOUT_S:g} s for a ready group without any progress: "
                    f"{counts.trajectories_leased} trajectories leased, {counts.trajectories_unscored} unscored"
                )
        return False

    def _publish(self, iteration: int, left_out: dict[str, list[int]]) -> None:
        """The next version: its weights whole, its number in the store, its budget granted, then the actors told."""
        self.version += 1
        handle = self._publish_weights()
        self._call("publish", self.version, iteration, left_out)
        self._grant_first_budget()
        self._supervisor.offer_weights(handle, timeout_s=APPLY_TIMEOUT_S)

    def _publish_weights(self) -> Any:
        return self._learners("publish", self.version, what=f"publishing version {self.version}")[0]

    def _grant_first_budget(self) -> None:
        counts: Counts = self._call("counts")
        if counts.tokens_budget == 0:
            self._call("set_quota", next_quota(self._settings, counts))

    def _checkpoint(self) -> None:
        """Claims durable, then the files, which the learner writes beside its next iteration."""
        self._commit_checkpoint()
        root = self._run_dir / "checkpoints"
        lsn = self._call("sync")
        manifest = Manifest.new(root, iteration=self.iteration, version=self.version, lsn=lsn)
        shutil.rmtree(manifest.writing, ignore_errors=True)  # left by a crash while saving
        self._learners("save", str(manifest.writing), what="saving a checkpoint")
        refs = [learner.await_saved.remote() for learner in self._supervisor.learners]
        self._saving, self._checkpointed = (manifest, refs), self.iteration

    def _commit_checkpoint(self) -> None:
        """Files whole, rename of the manifest (the commit point), then the store's commit and the archive."""
        if self._saving is None:
            return
        (manifest, refs), self._saving = self._saving, None
        self._await_learners(refs, what="writing a checkpoint", timeout_s=STEP_TIMEOUT_S)
        commit_checkpoint(manifest.root, manifest)
        self._call("commit", manifest.iteration)
        prune(manifest.root, self._config.learner.keep_checkpoints)
        self._archive()

    def _archive(self) -> None:
        """Archive what is committed, beside training; evict what the oldest kept checkpoint covers."""
        self._await_archive()
        oldest = oldest_manifest(self._run_dir / "checkpoints")
        claims = self._call("claims")
        committed = sorted(iteration for iteration, state in claims.items() if state == "committed")
        if oldest is not None and committed:
            self._archive_ref = self._store.archive.remote(committed, oldest.iteration)

    def _await_archive(self) -> None:
        if self._archive_ref is not None:
            self._supervisor.wait([self._archive_ref], what="archiving claims", timeout_s=STEP_TIMEOUT_S)
            self._archive_ref = None

    def _record(self, batch: TrainBatch, metrics: dict[str, Any], spent: Counts, times: dict[str, float]) -> None:
        supervisor = self._supervisor
        counts, ledger = self._call("sample")
        busy, waited = supervisor.busy_s, supervisor.waited_s
        supervisor.busy_s = supervisor.waited_s = 0.0
        tokens = supervisor.tokens - self._tokens_before
        self._tokens_before = Counter(supervisor.tokens)
        values = {
            **store_values(counts, ledger),
            "iteration": self.iteration,
            "version": self.version,
            **claim_metrics(batch),
            **metrics,
            "scheduler/tokens_budget": spent.tokens_budget,
            "scheduler/tokens_spent": spent.tokens_spent,
            "rollout/tokens_per_s": tokens["generated_tokens"] / times["time/iteration_s"],
            "rollout/busy_share": busy / max(busy + waited, 1e-9),
            "rollout/reprefill_tokens": ledger["reprefill"],
            **_speculation(self._config, tokens),
            **times,
        }
        supervisor.recorder.metric("iteration", values)
        supervisor.live.iteration(values)

    def _learners(self, method: str, *args: Any, what: str, timeout_s: float = 600.0) -> list[Any]:
        refs = [getattr(learner, method).remote(*args) for learner in self._supervisor.learners]
        return self._await_learners(refs, what=what, timeout_s=timeout_s)

    def _await_learners(self, refs: list[Any], *, what: str, timeout_s: float) -> list[Any]:
        try:
            return self._supervisor.wait(refs, what=what, timeout_s=timeout_s)
        except ActorDied as error:
            raise LearnerDied(str(error)) from error

    def _call(self, method: str, *args: Any) -> Any:
        return self._supervisor.call(getattr(self._store, method), *args, what=f"the store's {method}")


def _speculation(config: Config, tokens: Mapping[str, int]) -> dict[str, float | None]:
    if config.rollout.speculation is None:
        return {}
    drafted = tokens["drafted_tokens"]
    return {"rollout/speculation_accepted_share": tokens["accepted_tokens"] / drafted if drafted else None}
