"""Is the trajectory store as fast as the disk, and as its peers?

Each question runs our store and its peers in one process, interleaved, every run in a fresh directory; ratios pair the
numbers of one round. Every batch that is read is compared with the truth. Workload: 20,000 trajectories in groups of
8, lognormal lengths with a mean of about 1,000 tokens, 12 B a token, one Python thread through the public API.

    uv run --group bench python bench/store.py --json out.json
    uv run --group bench python bench/store.py --only append --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from store_beside import beside
from store_fragments import fragments
from store_paired import Answer
from store_speed import (
    Bench,
    appending_threads,
    appends_each_synced,
    durable_appends,
    packed_reads,
    pipelined_appends,
)
from store_state import flat_cost, memory_and_disk, opening, wakeup


def across_processes(bench: Bench) -> Answer:
    """64 trajectories a call to another process: TransferQueue keeps them in memory, the store on disk."""
    # Imported late: no other question needs Ray and torch.
    from store_processes import across_processes

    return across_processes(bench)


def claim_to_ranks(bench: Bench) -> Answer:
    """4.1M tokens from the store actor to two learner ranks: each its own part, or the whole to both."""
    from store_claims import claim_to_ranks

    return claim_to_ranks(bench)


QUESTIONS: dict[str, Callable[[Bench], Answer]] = {
    "append": durable_appends,
    "pipelined": pipelined_appends,
    "always": appends_each_synced,
    "processes": across_processes,
    "read": packed_reads,
    "claim": claim_to_ranks,
    "wakeup": wakeup,
    "open": opening,
    "memory": memory_and_disk,
    "flat": flat_cost,
    "threads": appending_threads,
    "fragments": fragments,
    "beside": beside,
}


def conditions(directory: Path) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    packages = {}
    for name in ("lmdb", "numpy", "ray", "rocksdict", "transferqueue"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(directory)], capture_output=True, text=True, check=True)
    return {
        "cores": os.cpu_count(),
        "file_system": kind.stdout.strip(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "packages": packages,
        "python": platform.python_version(),
    }


def main() -> None:
    """Ask the chosen questions and print their answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(QUESTIONS), help="ask only this; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the workload's trajectories")
    parser.add_argument("--dir", type=Path, help="where the stores are made; a real disk")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="bench-store-", dir=args.dir))
    result: dict[str, Any] = {"conditions": conditions(root), "rounds": args.rounds, "scale": args.scale, "answers": {}}
    try:
        for name in args.only or QUESTIONS:
            start, load = time.perf_counter(), os.getloadavg()[0]
            answer = QUESTIONS[name](Bench(directory=root, rounds=args.rounds, scale=args.scale))
            print(f"{name}: {(QUESTIONS[name].__doc__ or '').splitlines()[0]}  [load {load:.1f}]")
            print(answer.text(), flush=True)
            seconds = time.perf_counter() - start
            result["answers"][name] = answer.as_dict() | {"load_before": load, "seconds": seconds}
            if args.json:
                args.json.write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
