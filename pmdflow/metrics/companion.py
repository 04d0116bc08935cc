"""Processes beside a run that only follow its files: their death or slowness cannot touch it."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pmdflow.errors import LaunchError

KILL_TIMEOUT_S = 5.0
_OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)


class Companion:
    """A `pmdflow` command in a process of its own, whose output goes to `RUN/logs/NAME.log`.

    Example:
        >>> companion = Companion(run, "sink-wandb", "sink", str(run), "wandb")      # doctest: +SKIP
        >>> companion.end(within_s=30.0)                                             # doctest: +SKIP
        0
    """

    def __init__(self, run: Path, name: str, *arguments: str, idle: bool = False) -> None:
        """Start it; `idle`: see `stand_back`. It gets SIGTERM when this process dies, however that dies."""
        self.name = name
        self.log = run / "logs" / f"{name}.log"
        with open(self.log, "ab") as log:
            # Its own group: Ctrl-C in the terminal drains the run, and the companion stays until the end. The run's
            # session: in another one its niceness would count for nothing where the kernel groups tasks by session.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pmdflow.cli", *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=stand_back if idle else die_with_parent,
            )

    def ask(self) -> None:
        """Ask it to end; does not wait."""
        self._process.terminate()

    def end(self, *, within_s: float) -> int | None:
        """Ask it to end and wait; its exit code, or None if it had to be killed."""
        self.ask()
        try:
            return self._process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=KILL_TIMEOUT_S)
            return None


def end_all(companions: list[Companion], *, within_s: float) -> dict[str, int | None]:
    """End all of them at once; exit codes by name, None for one that had to be killed."""
    deadline = time.monotonic() + within_s
    for companion in companions:
        companion.ask()
    return {each.name: each.end(within_s=max(0.0, deadline - time.monotonic())) for each in companions}


def bind(setting: str, host: str, port: int, *, hint: str) -> socket.socket:
    """A socket at `host` and `port`, 0 for any free one; it does not listen yet.

    Raises:
        LaunchError: the port is taken, or the host no address of this machine; names `setting` and the remedy.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise _no_address(setting, host, error) from error
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno not in _OF_THE_PORT:
            raise _no_address(setting, host, error) from error
        raise LaunchError(f"{setting}: port {port} of {host} is taken ({error.strerror})", hint=hint) from error
    return bound


def require_port(setting: str, host: str, port: int, *, hint: str) -> int:
    """A port that can be listened at: `port`, or a free one if that is 0.

    Raises:
        LaunchError: see `bind`.
    """
    with bind(setting, host, port, hint=hint) as probe:
        return int(probe.getsockname()[1])


def _no_address(setting: str, host: str, error: OSError) -> LaunchError:
    return LaunchError(
        f"{setting}: host {host!r} is no address of this machine ({error.strerror})",
        hint="127.0.0.1 is for this machine alone, 0.0.0.0 is every address that it has",
    )


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def stand_back() -> None:
    """Take only the processor time that nobody else wants, and end with the parent."""
    os.nice(19)
    die_with_parent()
