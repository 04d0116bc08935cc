"""Claims archived from the log files themselves, beside the process that writes the store: it is asked nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pmdflow.metrics.spans import SpanBuffer
from pmdflow.store.archive.parts import is_archived
from pmdflow.store.archive.writing import write_part
from pmdflow.store.facade import TrajectoryStore
from pmdflow.store.plan import in_claim_order


def archive_claims(
    directory: Path,
    run_dir: Path,
    iterations: Sequence[int],
    *,
    attrs: Mapping[str, Any],
    steps_per_iteration: int,
    spans: SpanBuffer,
) -> None:
    """Write the parts of `iterations` that the archive of `run_dir` has not; repeating it is harmless.

    Args:
        directory: The store, which another process may be writing.
        run_dir: The run directory.
        iterations: Their claims are committed.
        attrs: Of every part.
        steps_per_iteration: Of claims that were trained before plans were recorded.
        spans: Gets one for each part that is written.

    Raises:
        Conflict: an iteration has no claim.
        PmdflowError: a part cannot be written.
    """
    # Opened anew each time: a reader keeps the files that it has seen, and their room on the disk.
    with TrajectoryStore.read(directory) as reader:
        for iteration in iterations:
            lsn = reader.claim_lsn(iteration)
            if is_archived(run_dir, iteration, claim_lsn=lsn):
                continue
            with spans.span("archive", iteration=iteration):
                batch = reader.read_claim(iteration)
                if batch.plan is None:  # trained before plans were recorded, so by the rule of then
                    plan = in_claim_order(len(batch.group_starts()), steps_per_iteration)
                    batch = replace(batch, plan=plan)
                write_part(run_dir, batch, attrs=attrs, claim_lsn=lsn)
