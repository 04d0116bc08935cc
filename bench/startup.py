"""Do the light commands answer at once?

`pmdflow --help`, `status` and `down` against the peer that they would pay for if they loaded what they do not need:
`python -c "import torch, ray"`. Taken in turn, median of 5; each may take a tenth of the peer at most. The run that
`status` reads is the one in `tests/fixtures`.

    uv run python bench/startup.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROUNDS = 5
MOST_SHARE = 0.1
RUN = Path(__file__).parents[1] / "tests" / "fixtures" / "run-1fa6726.tar.xz"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Byte code is kept from one start to the next, as on a machine where somebody works."""


def seconds(*arguments: str) -> float:
    """Wall time of one Python process from its start to its end."""
    started = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, *arguments], check=False, env=ENVIRONMENT, **quiet)
    return time.perf_counter() - started


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(RUN) as archive:
            archive.extractall(folder, filter="data")
        run = Path(folder) / "recorded"
        (run / "run.lock").touch()
        commands = {
            "import torch, ray": ("-c", "import torch, ray"),
            "pmdflow --help": ("-m", "pmdflow.cli", "--help"),
            "pmdflow status": ("-m", "pmdflow.cli", "status", str(run)),
            "pmdflow down": ("-m", "pmdflow.cli", "down", str(run)),
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(ROUNDS + 1):  # the first round fills page cache and byte code
            for name, arguments in commands.items():
                took = seconds(*arguments)
                if number:
                    times[name].append(took)
    peer, *others = (statistics.median(values) for values in times.values())
    print(f"{'import torch, ray':<20}{peer:8.3f} s")
    for name, median in zip(list(times)[1:], others, strict=True):
        print(f"{name:<20}{median:8.3f} s {median / peer:8.1%}")
    return int(any(median > MOST_SHARE * peer for median in others))


if __name__ == "__main__":
    sys.exit(main())
