"""The dashboard as a process of its own, so that its death or slowness cannot touch the run."""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from pmdflow.errors import LaunchError

STOP_TIMEOUT_S = 5.0


class DashboardProcess:
    """A running dashboard, ended when the context is left.

    Example:
        with DashboardProcess.start(run, port=0) as dashboard:
            print(dashboard.url)
    """

    def __init__(self, process: subprocess.Popen[bytes] | None, url: str | None) -> None:
        """Use `start` instead."""
        self._process = process
        self.url = url
        """None if the configuration asks for no dashboard."""

    @classmethod
    def start(cls, run: Path, port: int | None) -> DashboardProcess:
        """Serve `run` on 127.0.0.1; port 0 takes a free one, None serves nothing.

        Raises:
            LaunchError: the port is taken.
        """
        if port is None:
            return cls(None, None)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise LaunchError(
                    f"dashboard.port: port {port} is taken ({error.strerror})",
                    hint="choose another, 0 for any free one, or null for no dashboard",
                ) from error
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "pmdflow.cli", "dashboard", str(run), "--port", str(port)]
        with open(run / "logs" / "dashboard.log", "ab") as log:
            # Its own session: Ctrl-C in the terminal drains the run, and the dashboard stays until the end.
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        return cls(process, f"http://127.0.0.1:{port}")

    def __enter__(self) -> Self:
        """Already running."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=STOP_TIMEOUT_S)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when `up` dies, however it dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
