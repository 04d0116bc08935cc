"""Why a process of vLLM fails: its log alone says so, and this brings the first such words to the actor."""

from __future__ import annotations

import logging
import os

_PLACE = "PMDFLOW_VLLM_FAILURES"
"""Environment variable with the file that failures are written to."""
_MOST = 400
"""Characters that are told of a failure."""


class Failures:
    """A file in memory that processes of vLLM which are started from now on write to when they fail."""

    def __init__(self) -> None:
        """Tell them where, by the environment that they inherit."""
        self._file = os.memfd_create("pmdflow-vllm-failures")
        os.environ[_PLACE] = f"/proc/{os.getpid()}/fd/{self._file}"

    def first(self) -> str | None:
        """The first failure of any of them; None if none could say."""
        told = os.pread(self._file, _MOST, 0).decode(errors="replace")
        return told.partition("\n")[0] or None

    def close(self) -> None:
        """Let the memory go."""
        os.close(self._file)


def shown(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MOST]


class _Teller(logging.Handler):
    """Writes the exception of each record that has one."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        if error:
            with open(self._path, "a") as file:
                file.write(f"{shown(error)}\n")


def tell_failures() -> None:
    """In a process of vLLM: tell the actor of what it will log as an error."""
    if _PLACE in os.environ:
        logging.getLogger("vllm").addHandler(_Teller(os.environ[_PLACE]))
