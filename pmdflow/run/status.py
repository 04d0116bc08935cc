"""Stopping and showing a run from another terminal: reads files and sends a signal."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from pmdflow.run.directory import RunDirectory


def down(run: Path) -> int:
    """Ask the `up` process of a run to drain."""
    pid = RunDirectory.owner(run)
    if pid is None:
        sys.stderr.write(f"{run} is not running\n")
        return 1
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        sys.stderr.write(f"{run} has just ended\n")
        return 1
    sys.stdout.write(f"asked process {pid} to drain {run}\n")
    return 0


def status(run: Path) -> int:
    """Print whether a run is going on, and its newest numbers."""
    from pmdflow.metrics.summary import render_summary  # `down` does not wait for it

    pid = RunDirectory.owner(run)
    sys.stdout.write(f"{run}: {'not running' if pid is None else f'running, process {pid}'}\n")
    sys.stdout.write(render_summary(run) + "\n")
    return 0
