"""The dashboard as a process of its own, so that its death or slowness cannot touch the run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pmdflow.config.schema import DashboardConfig
from pmdflow.dashboard.access import is_local, shown_link, token_of, url_of
from pmdflow.metrics.companion import Companion, require_port

STOP_TIMEOUT_S = 5.0


class DashboardProcess:
    """A running dashboard, ended when the context is left.

    Example:
        with DashboardProcess.start(run, config.dashboard, output=sys.stderr) as dashboard:
            print(dashboard.url)
    """

    def __init__(self, process: Companion | None, url: str | None) -> None:
        """Use `start` instead."""
        self._process = process
        self.url = url
        """Its address, without a token; None if the configuration asks for no dashboard."""

    @classmethod
    def start(cls, run: Path, config: DashboardConfig, *, output: IO[str]) -> DashboardProcess:
        """Serve `run` as `config` says; a link with a token is written to `output`, once.

        Raises:
            LaunchError: the port is taken, the host is not of this machine, or there is no token and none can be made.
        """
        if config.port is None:
            return cls(None, None)
        hint = "choose another, 0 for any free one, or null for no dashboard"
        port = require_port("dashboard", config.host, config.port, hint=hint)
        token = None if is_local(config.host) else token_of(run)
        address = ("--host", config.host, "--port", str(port))
        url = url_of(config.host, port)
        if token is not None:
            output.write(f"dashboard: {shown_link(run, url, token, output)}\n")
            output.flush()
        return cls(Companion(run, "dashboard", "dashboard", str(run), *address), url)

    def __enter__(self) -> Self:
        """Already running."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        if self._process is not None:
            self._process.end(within_s=STOP_TIMEOUT_S)
