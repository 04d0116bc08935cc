"""How far the memory of this process grows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_S = 0.002


def resident_bytes() -> int:
    """Memory that this process has touched and that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


@contextmanager
def most_resident() -> Iterator[Callable[[], int]]:
    """Watch it meanwhile; what is given answers by how much it has grown at most."""
    before, done, most = resident_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            most[0] = max(most[0], resident_bytes() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: most[0]
    finally:
        done.set()
        watcher.join()
