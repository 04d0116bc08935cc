"""What one program did and when, line by line beside its output, for whoever looks at its episode."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX = ".turns.jsonl"


@dataclass(frozen=True, slots=True)
class Diary:
    """Of one program. Lines are `{"kind", "time", ...}`: start, turn, reward, died, end; a lost one harms nobody."""

    path: Path | None = None
    """Where; None keeps none."""

    def tell(self, kind: str, **what: Any) -> None:
        """Note something that has happened now."""
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "time": time.time(), **what}) + "\n")


def has_died(path: Path) -> bool:
    """Whether the program of a diary was killed, by nobody of us."""
    with contextlib.suppress(OSError):
        return any(line.startswith(b'{"kind": "died"') for line in path.read_bytes().splitlines())
    return False
