"""Archive parts that nobody wants any more."""

from __future__ import annotations

import shutil
from pathlib import Path

from pmdflow import durable
from pmdflow.store.archive.parts import part_iteration, parts

_GONE = ".gone"


def prune_parts(run_dir: Path, *, keep: int, through: int) -> list[int]:
    """Delete all but the newest `keep` parts, of those up to iteration `through`; returns their iterations.

    A part loses its name first, so that a crash leaves none that is half there. What a crash did leave goes too.

    Args:
        run_dir: Run directory.
        keep: Newest parts that stay in any case.
        through: The store has evicted the claims up to this one: later parts would be written again, and the oldest
            checkpoint is replayed with them.
    """
    deleted = []
    for path in parts(run_dir)[:-keep]:
        if part_iteration(path) <= through:
            durable.rename(path, path.with_name(path.name + _GONE))
            deleted.append(part_iteration(path))
    for left in (run_dir / "archive").glob(f"part-*{_GONE}"):
        shutil.rmtree(left)
    return deleted
