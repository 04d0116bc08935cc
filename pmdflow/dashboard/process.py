"""The dashboard as a process of its own, so that its death or slowness cannot touch the run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from pmdflow.metrics.companion import Companion, require_port

STOP_TIMEOUT_S = 5.0


class DashboardProcess:
    """A running dashboard, ended when the context is left.

    Example:
        with DashboardProcess.start(run, port=0) as dashboard:
            print(dashboard.url)
    """

    def __init__(self, process: Companion | None, url: str | None) -> None:
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
        hint = "choose another, 0 for any free one, or null for no dashboard"
        port = require_port("dashboard.port", "127.0.0.1", port, hint=hint)
        process = Companion(run, "dashboard", "dashboard", str(run), "--port", str(port))
        return cls(process, f"http://127.0.0.1:{port}")

    def __enter__(self) -> Self:
        """Already running."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        if self._process is not None:
            self._process.end(within_s=STOP_TIMEOUT_S)
