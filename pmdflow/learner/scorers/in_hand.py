"""What a scorer actor works on, in a file: the process that follows it knows what it died with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class InHand:
    """The trajectories that one scorer actor works on, and their attempts.

    Example:
        >>> InHand(Path("scorers/teacher-0.json")).died_with    # doctest: +SKIP
        {17: 0}
    """

    def __init__(self, path: Path) -> None:
        """Read what the process before this one left."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.died_with: dict[int, int] = {}
        """What it worked on when it died."""
        try:
            self.died_with = {int(id): int(attempt) for id, attempt in json.loads(path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self.died_with = {}  # there was none, or it died before it had begun

    def take(self, attempts: Mapping[int, int]) -> None:
        """Work begins on these."""
        self._path.write_text(json.dumps(attempts))

    def give(self) -> None:
        """It is done, and durable."""
        self._path.unlink(missing_ok=True)
