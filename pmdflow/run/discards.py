"""Groups that an operator wants gone: requests in the run directory, which the controller of a live run takes up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from pmdflow import durable
from pmdflow.errors import PmdflowError

FOLDER = "requests"
MAX_REASON_BYTES = 4096
"""The longest reason that the store keeps."""
_LARGEST_GROUP = 2**63 - 1


@dataclass(frozen=True, slots=True)
class DiscardRequest:
    """A group to be discarded, and why.

    Example:
        >>> DiscardRequest(group=7, reason="its reward divides by zero").name
        'discard-7.json'
    """

    group: int
    reason: str

    def __post_init__(self) -> None:
        """Refuse what the store could not record.

        Raises:
            PmdflowError: the group cannot be one, or the reason is empty, long or no UTF-8.
        """
        if type(self.group) is not int or not 0 <= self.group <= _LARGEST_GROUP:
            raise PmdflowError(
                f"{self.group!a:.40} is no group", hint=f"give a whole number from 0 to {_LARGEST_GROUP}"
            )
        if not isinstance(self.reason, str) or not self.reason.strip():
            raise PmdflowError(
                "discarding needs a reason", hint='say why for the record: --reason "its answer is wrong"'
            )
        try:
            length = len(self.reason.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise PmdflowError(
                f"the reason is no UTF-8 text at character {error.start}", hint="write it in plain characters"
            ) from error
        if length > MAX_REASON_BYTES:
            raise PmdflowError(
                f"the reason has {length} bytes, at most {MAX_REASON_BYTES} are kept", hint="shorten the reason"
            )

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
        """The request in a file; None where somebody else's file is in the way.

        Raises:
            PmdflowError: it asks for what cannot be.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            group, reason = values["group"], values["reason"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return cls(group=group, reason=reason)


def pending(run: Path) -> Iterator[tuple[Path, DiscardRequest | PmdflowError]]:
    """Every request that is not taken up, or why it is refused, with its file, which whoever takes it up removes."""
    for path in sorted((run / FOLDER).glob("discard-*.json")):
        try:
            request = DiscardRequest.read(path)
        except PmdflowError as refused:
            yield path, refused
            continue
        if request is not None:
            yield path, request


class Tell(Protocol):
    """Records an event about a request, and the group it is about where there is one."""

    def __call__(self, message: str, **attrs: object) -> None:
        """Record `message`."""


def take_up(run: Path, discard: Callable[[int, str], str], tell: Tell) -> None:
    """Answer every request by an event and remove it: discarded as `discard` says in words, or refused."""
    for path, request in pending(run):
        if isinstance(request, PmdflowError):
            path.unlink(missing_ok=True)
            tell(f"request {path.name!a} is refused: {request}")
            continue
        said = discard(request.group, request.reason)
        path.unlink(missing_ok=True)
        tell(f"group {request.group} {said}", group=request.group)
