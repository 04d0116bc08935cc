"""A wait that lasts as long as the store is written to."""

from __future__ import annotations

import time

from pmdflow.errors import WaitTimeout
from pmdflow.types import Counts

STALL_TIMEOUT_S = 900.0
"""What is waited for is given up when nothing was written to the store for this long."""


class Progress:
    """What is waited for as long as the store is written to."""

    def __init__(self, what: str) -> None:
        """Begin to wait for `what`."""
        self._what = what
        self._lsn, self._since = -1, time.monotonic()

    def require(self, counts: Counts) -> None:
        """Go on waiting.

        Raises:
            WaitTimeout: nothing was written for `STALL_TIMEOUT_S`.
        """
        if counts.lsn != self._lsn:
            self._lsn, self._since = counts.lsn, time.monotonic()
        elif time.monotonic() - self._since > STALL_TIMEOUT_S:
            raise WaitTimeout(
                f"{self._what}, without any progress for {STALL_TIMEOUT_S:g} s: {counts.trajectories_leased} "
                f"trajectories leased, {counts.trajectories_idle} idle, {counts.trajectories_unscored} unscored"
            )
