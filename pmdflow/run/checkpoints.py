"""Checkpoints of a run: files saved, manifest renamed, claims committed, then archived and evicted, in that order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from ray import ObjectRef
from ray.actor import ActorHandle

from pmdflow.config.schema import Config
from pmdflow.errors import PmdflowError
from pmdflow.learner.actor import LearnerActor
from pmdflow.learner.checkpoint.manifest import (
    CheckpointFile,
    Manifest,
    commit_checkpoint,
    newest_manifest,
    oldest_manifest,
    prune,
)
from pmdflow.metrics.report import ActorReport
from pmdflow.run.learner_group import LearnerGroup
from pmdflow.run.supervision import Supervisor
from pmdflow.store.actor import StoreActor
from pmdflow.store.archive.actor import ArchiveActor
from pmdflow.store.archive.pruning import prune_parts
from pmdflow.store.client import call

Answer = TypeVar("Answer")

WRITE_TIMEOUT_S = 7200.0
"""Files or archive parts that are not written after this long never will be."""


class Checkpoints:
    """Saves beside training; what the newest one covers is committed before the next one begins."""

    def __init__(
        self,
        *,
        config: Config,
        run_dir: Path,
        supervisor: Supervisor,
        learners: LearnerGroup,
        start_archive: Callable[[], ActorHandle[ArchiveActor]],
    ) -> None:
        """Use `run_dir`/checkpoints; `start_archive` creates the actor that archives, when there is something to."""
        self._root = run_dir / "checkpoints"
        self._keep = config.learner.keep_checkpoints
        self._supervisor = supervisor
        self._learners = learners
        self._saving: tuple[Manifest, list[ObjectRef[tuple[CheckpointFile, ...]]]] | None = None
        """The checkpoint whose files are being written, and what the ranks answer when they are whole."""
        self._keep_parts = config.archive.keep
        self._run_dir = run_dir
        self._start_archive = start_archive
        self._archive: ActorHandle[ArchiveActor] | None = None
        """None until there is something to archive: its process need not start while all others do."""
        self._archiving: tuple[ObjectRef[ActorReport], int] | None = None
        """What is answered when all is archived and evicted, and the iteration up to which it is evicted."""
        self.saved_iteration = 0
        """Newest iteration whose checkpoint is committed or being written."""

    def recover(self) -> Manifest | None:
        """Forget what was being written; returns the newest whole checkpoint, from which the run goes on.

        Raises:
            PmdflowError: the store is older than that checkpoint.
        """
        self._saving = None
        manifest = self._aside(partial(newest_manifest, self._root), "looking for the newest checkpoint")
        if manifest is not None:
            counts = self._supervisor.get(call(self._supervisor.store, StoreActor.counts), what="the store's counts")
            require_store_of(manifest, store=self._root.parent / "store", lsn=counts.lsn)
        self.saved_iteration = 0 if manifest is None else manifest.iteration
        return manifest

    @property
    def is_saving(self) -> bool:
        """Whether files are being written whose commit will free room in the store."""
        return self._saving is not None

    def save(self, *, iteration: int, version: int) -> None:
        """Claims durable, then the files, which the learner writes beside its next iteration.

        Raises:
            LearnerDied: a rank died, now or while it wrote the checkpoint before this one.
            PmdflowError: files cannot be written.
        """
        self.commit()
        lsn = self._supervisor.get(call(self._supervisor.store, StoreActor.sync), what="syncing the store")
        manifest = Manifest.new(self._root, iteration=iteration, version=version, lsn=lsn)
        if manifest.writing.exists():  # left by a crash while saving
            self._aside(partial(shutil.rmtree, manifest.writing, ignore_errors=True), "removing a checkpoint's rest")
        self._learners.wait(self._learners.call(LearnerActor.save, str(manifest.writing)), what="saving a checkpoint")
        self._saving = manifest, self._learners.call(LearnerActor.await_saved)
        self.saved_iteration = iteration

    def commit(self) -> None:
        """Files whole, rename of the manifest (the commit point), then the store's commit and the archive.

        Raises:
            LearnerDied: a rank died before its files were whole.
        """
        if self._saving is None:
            return
        (manifest, refs), self._saving = self._saving, None
        written = self._learners.wait(refs, what="writing a checkpoint", timeout_s=WRITE_TIMEOUT_S)
        files = chain.from_iterable(written)
        self._aside(partial(commit_checkpoint, manifest.root, manifest, files), "committing a checkpoint")
        committed = call(self._supervisor.store, StoreActor.commit, manifest.iteration)
        self._supervisor.get(committed, what="committing claims")
        self._aside(partial(prune, manifest.root, self._keep), "removing old checkpoints")
        self.archive()

    def archive(self) -> None:
        """Archive what is committed, beside training; evict what the oldest kept checkpoint covers."""
        self.await_archive()
        oldest = self._aside(partial(oldest_manifest, self._root), "looking for the oldest checkpoint")
        claims = self._supervisor.get(call(self._supervisor.store, StoreActor.claims), what="the store's claims")
        committed = sorted(iteration for iteration, state in claims.items() if state == "committed")
        if oldest is not None and committed:
            self._archive = self._archive or self._start_archive()
            store = self._supervisor.store
            archived = call(self._archive, ArchiveActor.archive, store, committed, oldest.iteration)
            self._archiving = archived, oldest.iteration

    def await_archive(self) -> None:
        """Wait until what was to be archived is, and what it covers is evicted; then old parts may go."""
        if self._archiving is not None:
            archived, evicted_through = self._archiving
            report = self._supervisor.get(archived, what="archiving claims", timeout_s=WRITE_TIMEOUT_S)
            self._supervisor.telemetry.take(report, source="archive")
            self._archiving = None
            if self._keep_parts is not None:
                pruned = partial(prune_parts, self._run_dir, keep=self._keep_parts, through=evicted_through)
                self._aside(pruned, "removing old archive parts")

    def _aside(self, work: Callable[[], Answer], what: str) -> Answer:
        return self._supervisor.aside(work, what=what)


def require_store_of(manifest: Manifest, *, store: Path, lsn: int) -> None:
    """Refuse a store that ends before what a checkpoint covers: groups would be trained twice, or never.

    Raises:
        PmdflowError: names both places, both log positions and the remedy.
    """
    if lsn < manifest.lsn:
        raise PmdflowError(
            f"{store} ends at record {lsn}, the checkpoint {manifest.path} covers records up to {manifest.lsn}: "
            "the store is older than the checkpoint",
            hint="put back the store of the same time; or remove that checkpoint's .json to resume from an earlier one",
        )
