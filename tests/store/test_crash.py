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

import numpy as np
import pytest

from pmdflow.store import TrajectoryStore
from tests.support.crash_child import open_store, tokens_of
from tests.support.crash_model import Model
from tests.support.paths import SUPPORT

KILLS_PER_DIRECTORY = 25
MOST_LINES = 250
"""A life ends at a random one of its first so many lines."""
LONGEST_PAUSE_S = 0.004
"""And up to so much later, anywhere in a call."""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[bytes]]:
    program = SUPPORT / "crash_child.py"
    with subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


def kill_once(server: subprocess.Popen[bytes], directory: Path, model: Model, random: np.random.Generator) -> None:
    """One life, heard until it is killed at a random instant."""
    last, pid = int(random.integers(0, MOST_LINES)), 0
    order = [str(directory), int(random.integers(1 << 30)), model.checkpoint]
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
        if number == last:
            time.sleep(random.uniform(0, LONGEST_PAUSE_S))  # where in a call it dies is to be random
            os.kill(pid, signal.SIGKILL)
    raise AssertionError("the server of children died")


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
    for first in range(0, kills, KILLS_PER_DIRECTORY):
        directory, copy, model = tmp_path / f"store{first}", tmp_path / "copy", Model()
        directory.mkdir()
        for _ in range(KILLS_PER_DIRECTORY):
            kill_once(server, directory, model, random)
            # The child goes on where the kill left the files; only the copy is ever closed in order.
            shutil.copytree(directory, copy)
            store = open_store(copy)
            model.verify(store)
            store.close()
            shutil.rmtree(copy)
        lines += model.lines
        shutil.rmtree(directory)
    rare = {"appended", "scored", "admitted", "claimed", "published", "committed", "evicted"}
    assert all(lines[kind] >= kills / 10 for kind in rare), f"too little happened between the kills: {lines}"
