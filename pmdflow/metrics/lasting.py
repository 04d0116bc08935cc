"""Output that may go away: a run does not end because its terminal, or the reader of a pipe, has."""

from __future__ import annotations

import contextlib
import io
import os
from typing import IO, Any, cast


class _Lasting:
    """A text stream whose failures are swallowed; after the first one, nothing is written any more."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._is_gone = False

    def write(self, text: str) -> int:
        if not self._is_gone:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # hung up, a pipe without a reader, a full device; closed
                self._leave()
        return len(text)

    def flush(self) -> None:
        if not self._is_gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._leave()

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
