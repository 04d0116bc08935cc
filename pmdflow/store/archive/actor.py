"""The archive as a Ray actor: a process of its own, so that writing parts takes nothing from the store's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from pmdflow.metrics.report import ActorReport
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.store.actor import StoreActor
from pmdflow.store.archive.claims import archive_claims
from pmdflow.store.client import StoreHandle, call

EVICT_TIMEOUT_S = 600.0
"""An eviction that is not done by then never will be; it outlasts a restart of the store actor."""


class ArchiveActor:
    """Archives committed claims beside the store, whose files it reads.

    Consumes: committed claims. Produces: archive parts, and the eviction of what has one. Waits for: the disk, and the
    store's eviction.
    """

    def __init__(
        self,
        *,
        directory: str,
        run_dir: str,
        attrs: dict[str, Any],
        steps_per_iteration: int,
    ) -> None:
        """Archive what the store has in `directory` into `run_dir`; `attrs` are those of every part."""
        self._directory = Path(directory)
        self._run_dir = Path(run_dir)
        self._attrs = attrs
        self._steps_per_iteration = steps_per_iteration
        self._spans = SpanBuffer("archive")

    def archive(self, store: StoreHandle, iterations: Sequence[int], evict_through: int) -> ActorReport:
        """Archive the committed claims of `iterations`, then have `store` evict those up to `evict_through`.

        The handle comes with each call: Ray may not find one again with which it would restart this actor.

        Returns:
            The spans since the last call.
        """
        archive_claims(
            self._directory,
            self._run_dir,
            iterations,
            attrs=self._attrs,
            steps_per_iteration=self._steps_per_iteration,
            spans=self._spans,
        )
        ray.get(call(store, StoreActor.evict, evict_through), timeout=EVICT_TIMEOUT_S)
        return ActorReport(spans=self._spans.drain(), events=self._spans.losses())
