"""`pmdflow sink`: follow a run's files and send what they say to one place, until the run is over."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pmdflow import durable
from pmdflow.config.installed import require_sink
from pmdflow.config.load import load_run
from pmdflow.config.sinks import SinkConfig, SinkName
from pmdflow.errors import LaunchError
from pmdflow.file_lock import wait_for_lock
from pmdflow.metrics.sinks.rows import Rows
from pmdflow.metrics.sinks.sink import Sink, open_sink

PAUSE_S = 1.0
"""Between two looks at the files."""
FREE_TIMEOUT_S = 10.0
"""For the sink of a run that has just been killed to end."""


def run_sink(run: Path, name: SinkName, *, is_live: Callable[[], bool]) -> int:
    """Send the run's metrics to the sink `name`, with the settings that the run's configuration has for it.

    Ends when the run is over and everything is sent; on SIGTERM or Ctrl-C when everything so far is.

    Args:
        run: Run directory, live or not.
        name: Which sink.
        is_live: Whether somebody still trains the run.

    Raises:
        PmdflowError: no such run, its library is missing, or the place refuses.
    """
    if not (run / "config.yaml").is_file():
        raise LaunchError(f"{run} is no run directory (it has no config.yaml)")
    configured = {sink.name: sink for sink in load_run(run).config.metrics.sinks}
    config = configured.get(name) or SinkConfig(name=name)
    require_sink(config.name)
    if name == "prometheus" and not is_live():
        raise LaunchError(f"{run} is not running: prometheus shows the newest numbers of a live run")
    told = threading.Event()
    with _alone(run, name):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: told.set())
        sent = follow(Rows(run), open_sink(run, config), is_live=is_live, told=told)
    sys.stdout.write(f"{name} has {sent} iterations and evaluations of {run}\n")
    return 0


@contextmanager
def _alone(run: Path, name: str) -> Iterator[None]:
    """Be the only sink of this name: two would write everything twice, or hide what the other one wrote.

    Raises:
        LaunchError: another one does not end.
    """
    durable.make_directories(run / "sinks")
    with open(run / "sinks" / f"{name}.lock", "w", encoding="utf-8") as lock:
        if not wait_for_lock(lock, timeout_s=FREE_TIMEOUT_S):
            raise LaunchError(
                f"a sink {name} sends the metrics of {run} already",
                hint="it is that of the live run, or of another `pmdflow sink`; end that one first",
            )
        yield


def follow(rows: Rows, sink: Sink, *, is_live: Callable[[], bool], told: threading.Event) -> int:
    """Give `sink` the rows as they come, until the run is over or `told` is set; returns how many made its curves."""
    number = 0
    try:
        over = False
        while not over:
            over = told.is_set() or not is_live()  # asked before the last look, which then sees everything
            for row in rows.read():
                sink.send(row)
                number += row.kind != "sample"
            if not over:
                told.wait(PAUSE_S)
    finally:
        sink.close()
    return number
