"""A lock on a file that several processes of a machine take in turn."""

from __future__ import annotations

import fcntl
import time
from typing import IO, Any

POLL_S = 0.02


def wait_for_lock(file: IO[Any], *, timeout_s: float) -> bool:
    """Lock an open file until it is closed; False if another process holds it for `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
