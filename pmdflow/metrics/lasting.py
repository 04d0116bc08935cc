"""Output that may go away or stand still: a run neither ends nor waits with its terminal, or the reader of a pipe."""

from __future__ import annotations

import contextlib
import io
import os
import select
from typing import IO, Any, cast

PIECE = 1000
"""Characters written at once: what a pipe that says it takes something has room for."""
PATIENCE_MS = 2000
"""How long a reader that stands still is waited for, the first time."""


class _Lasting:
    """A text stream whose failures are swallowed; after the first one, nothing is written any more.

    What a reader that stands still (Ctrl-S, a stuck collector of logs) does not take is dropped, until it goes on.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._is_gone = False
        self._is_stuck = False

    def write(self, text: str) -> int:
        for start in range(0, len(text), PIECE):
            if self._is_gone or not self._takes():
                break
            try:
                self._stream.write(text[start : start + PIECE])
                self._stream.flush()
            except (OSError, ValueError):  # hung up, a pipe without a reader, a full device; closed
                self._leave()
        return len(text)

    def flush(self) -> None:
        """Each write was."""

    def _takes(self) -> bool:
        try:
            number = self._stream.fileno()
        except (OSError, ValueError):  # no file, or a closed one
            return True
        poll = select.poll()
        poll.register(number, select.POLLOUT)
        self._is_stuck = not poll.poll(0 if self._is_stuck else PATIENCE_MS)
        return not self._is_stuck

    def _leave(self) -> None:
        """Nothing that is still buffered may fail once more when the interpreter ends."""
        self._is_gone = True
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting(stream: IO[str]) -> IO[str]:
    """`stream` for output that nobody depends on.

    Example:
        >>> lasting(open("/dev/full", "w")).write("as if it were there")
        19
    """
    return cast(IO[str], _Lasting(stream))
