"""Stopping and showing a run from another terminal: reads files and sends a signal."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from pmdflow.errors import LaunchError
from pmdflow.run.directory import RunDirectory


def down(run: Path) -> int:
    """Ask the `up` process of a run to drain.

    Raises:
        LaunchError: that process is on another machine, or in another container.
    """
    owner = RunDirectory.owner(run)
    if owner is None:
        sys.stderr.write(f"{run} is not running\n")
        return 1
    if not owner.is_here:
        where = owner.place or "an unknown machine"
        raise LaunchError(
            f"{run} is run by process {owner.pid} of {where}, which is not here",
            hint=f"run `pmdflow down {run}` there, or `kill -INT {owner.pid}`",
        )
    try:
        os.kill(owner.pid, signal.SIGINT)
    except ProcessLookupError:
        sys.stderr.write(f"{run} has just ended\n")
        return 1
    sys.stdout.write(f"asked process {owner.pid} to drain {run}\n")
    return 0


def status(run: Path) -> int:
    """Print whether a run is going on, and its newest numbers."""
    from pmdflow.metrics.summary import render_summary  # `down` does not wait for it

    owner = RunDirectory.owner(run)
    where = "" if owner is None or owner.is_here else f" of {owner.place or 'an unknown machine'}"
    sys.stdout.write(f"{run}: {'not running' if owner is None else f'running, process {owner.pid}{where}'}\n")
    sys.stdout.write(render_summary(run) + "\n")
    return 0
