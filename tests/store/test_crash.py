"""A process that uses the store is killed again and again: what was acknowledged is there, and nothing by half."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from pmdflow.store import TrajectoryStore
from tests.support.crash_child import LOADS, Durability, open_store, tokens_of
from tests.support.crash_model import Model
from tests.support.paths import SUPPORT

KILLS_PER_DIRECTORY = 16
KINDS = [(load, durability) for durability in get_args(Durability) for load in LOADS]
"""Of directories, in turn."""
MOST_LINES = {"small": 120, "large": 16}
"""A life ends at a random one of its first so many lines."""
LONGEST_PAUSE_S = 0.004
"""And up to so much later, anywhere in a call."""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[bytes]]:
    program = SUPPORT / "crash_child.py"
    with subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


def kill_once(
    server: subprocess.Popen[bytes], directory: Path, durability: Durability, model: Model, random: np.random.Generator
) -> None:
    """One life, heard until it is killed at a random instant; with large appends, in or soon after one of them."""
    last, pid = int(random.integers(0, MOST_LINES[model.load])), 0
    order = [str(directory), int(random.integers(1 << 30)), model.checkpoint, model.load, durability]
    server.stdin.write(json.dumps(order).encode() + b"\n")
    server.stdin.flush()
    for number, line in enumerate(server.stdout):
        kind, *rest = json.loads(line)
        if kind == "born":
            (pid,) = rest
        elif kind == "dead":
            return
        else:
            model.hear(kind, *rest)
        if kind == "claimed":
            look(directory)
        if number >= last and (model.load == "small" or kind == "appending" or number > 2 * last + 10):
            last = 1 << 30
            time.sleep(random.uniform(0, LONGEST_PAUSE_S))  # where in a call it dies is to be random
            os.kill(pid, signal.SIGKILL)
    raise AssertionError("the server of children died")


def copy_of(directory: Path, copy: Path) -> None:
    """Copy a store; of what is never written again a link does."""
    written = sorted(directory.glob("*.log"))[-2:]
    copy.mkdir()
    for path in directory.iterdir():
        if path in written or path.suffix != ".log":
            shutil.copyfile(path, copy / path.name)
        else:
            os.link(path, copy / path.name)


def look(directory: Path) -> None:
    """Read beside the living writer: whole calls only, with the content that they were given."""
    reader, length = TrajectoryStore.read(directory), 0
    for trajectory in [t for row in reader.groups() for t in row["trajectories"]]:
        tokens = reader.trajectory(trajectory)["tokens"]
        assert tokens.tobytes() == tokens_of(trajectory, 0, len(tokens)).tobytes()
        length += len(tokens)
    assert length <= reader.ledger()["generated"]
    reader.close()


@pytest.mark.parametrize(
    "kills", [pytest.param(100), pytest.param(1000, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])]
)
def test_kills_lose_nothing_acknowledged_and_leave_nothing_half(
    tmp_path: Path, server: subprocess.Popen[bytes], kills: int
) -> None:
    random, lines = np.random.default_rng(kills), Counter[str]()
    directories = kills // KILLS_PER_DIRECTORY
    for number in range(directories):
        load, durability = KINDS[number % len(KINDS)]
        directory, copy, model = tmp_path / f"store{number}", tmp_path / "copy", Model(load)
        directory.mkdir()
        for _ in range(number, kills, directories):
            kill_once(server, directory, durability, model, random)
            # The child goes on where the kill left the files; only the copy is ever closed in order.
            copy_of(directory, copy)
            store = open_store(copy, load)
            model.verify(store)
            store.close()
            shutil.rmtree(copy)
        lines += model.lines
        shutil.rmtree(directory)
    rare = {"appended", "scored", "admitted", "claimed", "published", "committed", "evicted"}
    assert all(lines[kind] >= kills / 10 for kind in rare), f"too little happened between the kills: {lines}"
