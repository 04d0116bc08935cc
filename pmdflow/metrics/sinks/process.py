"""The sinks of a live run, each a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pmdflow.config.installed import require_sink
from pmdflow.config.sinks import SinkConfig
from pmdflow.metrics.companion import Companion, end_all, require_port

FINISH_TIMEOUT_S = 30.0
"""A finished run waits so long for its sinks to send the rest; who is late can do it afterwards."""


class SinkProcesses:
    """Follows a run to all its sinks; ended when the context is left.

    Example:
        with SinkProcesses.start(run, config.metrics.sinks):
            train()
    """

    def __init__(self, run: Path, processes: list[Companion]) -> None:
        """Use `start` instead."""
        self._run = run
        self._processes = processes

    @classmethod
    def start(cls, run: Path, sinks: Sequence[SinkConfig]) -> SinkProcesses:
        """Start a process for each of `sinks`.

        Raises:
            LaunchError: a library is not installed, or a port is taken; nothing was started.
        """
        for sink in sinks:
            require_sink(sink.name)
            if sink.name == "prometheus":
                require_port("metrics.sinks", sink.host, sink.port, hint="choose another `port`")
        return cls(run, [Companion(run, f"sink-{sink.name}", "sink", str(run), sink.name, idle=True) for sink in sinks])

    def __enter__(self) -> Self:
        """They run already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let them send what is left; say which could not."""
        codes = end_all(self._processes, within_s=FINISH_TIMEOUT_S)
        for process in self._processes:
            if codes[process.name] != 0:
                name = process.name.removeprefix("sink-")
                sys.stderr.write(
                    f"metrics.sinks: {name} has not got everything (see {process.log}); "
                    f"`pmdflow sink {self._run} {name}` sends the rest\n"
                )
