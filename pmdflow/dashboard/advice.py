"""What would run better than a run does, by models fitted to it: simulated now and then in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pmdflow.metrics.companion import stand_back

FIRST_S, REFRESH_S = 30.0, 600.0
"""Time until the first look, and between two: what would be better changes slowly, and the run needs the processors."""
SEARCH_S, DEADLINE_S = 10.0, 120.0
"""Time that a search is told to end within, and after which it is killed: reading a long run takes some, too."""


class AdviceView:
    """The newest advice for one run; a search is begun when somebody asks, in the background.

    Example:
        >>> AdviceView(Path("runs/quickstart")).lines(revision=1)
        []
    """

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Search nothing yet."""
        self._run_dir = run_dir
        self._clock = clock
        self._due = clock() + FIRST_S
        self._searched = 0
        """Revision of the files at the newest search."""
        self._lines: Sequence[str] = []
        self._thread: threading.Thread | None = None

    def lines(self, *, revision: int) -> Sequence[str]:
        """What the newest search found, its models first; never waits. Empty until a run says enough.

        Args:
            revision: Grows with the files of the run: without news of it nothing is searched again.
        """
        searching = self._thread is not None and self._thread.is_alive()
        if not searching and revision != self._searched and self._clock() >= self._due:
            self._searched, self._due = revision, self._clock() + REFRESH_S
            self._thread = threading.Thread(target=self._search, name="advice", daemon=True)
            self._thread.start()
        return self._lines

    def wait(self, timeout_s: float) -> None:
        """Wait for the search under way, if there is one."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _search(self) -> None:
        config = str(self._run_dir / "config.yaml")
        arguments = ["simulate", config, "--from", str(self._run_dir), "--advice", str(SEARCH_S)]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pmdflow.cli", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                text=True, timeout=DEADLINE_S, check=False, preexec_fn=stand_back,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return
        if done.returncode == 0:
            self._lines = done.stdout.splitlines()
