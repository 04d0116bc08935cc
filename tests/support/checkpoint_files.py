"""What a learner rank says of the files that it wrote."""

from __future__ import annotations

import zlib
from pathlib import Path

from pmdflow.learner.checkpoint.manifest import CheckpointFile


def written(directory: Path) -> list[CheckpointFile]:
    """All files of a directory as their writer would name them."""
    return [
        CheckpointFile(
            path=path.relative_to(directory).as_posix(), size=path.stat().st_size, crc32=zlib.crc32(path.read_bytes())
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]
