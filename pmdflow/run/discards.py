"""Groups that an operator wants gone: requests in the run directory, which the controller of a live run takes up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pmdflow import durable

FOLDER = "requests"


@dataclass(frozen=True, slots=True)
class DiscardRequest:
    """A group to be discarded, and why.

    Example:
        >>> DiscardRequest(group=7, reason="its reward divides by zero").name
        'discard-7.json'
    """

    group: int
    reason: str

    @property
    def name(self) -> str:
        """File name of the request."""
        return f"discard-{self.group}.json"

    def write(self, run: Path) -> Path:
        """Leave the request in the run directory; a second one for the group replaces it."""
        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        durable.sync(run)
        durable.write(folder / self.name, json.dumps({"group": self.group, "reason": self.reason}) + "\n")
        return folder / self.name

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The request in a file; None where somebody else's file is in the way."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(group=int(values["group"]), reason=str(values["reason"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def pending(run: Path) -> Iterator[tuple[Path, DiscardRequest]]:
    """Every request that is not taken up, with its file, which whoever takes it up removes afterwards."""
    for path in sorted((run / FOLDER).glob("discard-*.json")):
        request = DiscardRequest.read(path)
        if request is not None:
            yield path, request
