"""Real runs that are told to end by a batch system and by a terminal that closes, in places as bare as these have."""

from __future__ import annotations

import os
import pty
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pmdflow.learner.checkpoint.manifest import oldest_manifest
from pmdflow.store.archive import part_iteration, parts
from tests.support.runs import Up, small_config

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(400)]
BARE = {"LANG": "C", "LC_ALL": "C", "TERM": "dumb", "COLUMNS": "20", "RAY_ADDRESS": "127.0.0.1:1"}
"""Where batch jobs run, beside a Ray that is not ours: `cluster.address` alone says which one a run joins."""


def test_sigterm_drains_and_a_closing_terminal_drains_what_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in BARE.items():
        monkeypatch.setenv(name, value)
    config = small_config(tmp_path, run__iterations=50, run__drain_s=100.0, learner__lr_schedule="linear")
    config["learner"]["lr_decay_steps"] = 20
    config["archive"] = {"keep": 1}
    early = Up(tmp_path, config)
    early.wait_for(lambda: bool(early.events()), "the beginning, while Ray starts and has SIGTERM for itself")
    os.kill(early.process.pid, signal.SIGTERM)
    assert (early.wait(), early.output.count("stopped at once")) == (130, 1), early.output
    assert early.events()[-1]["kind"] == "stop"

    up = Up(tmp_path, config)
    up.wait_for(lambda: up.reached(1), "the first iteration")
    os.kill(up.process.pid, signal.SIGTERM)
    assert up.wait() == 0, up.output
    assert f"pmdflow up {up.file}" in up.output
    saved = up.iterations()[-1]["iteration"]
    assert (up.run / "checkpoints" / f"iteration-{saved:06d}.json").exists()

    os.environ["TERM"] = "xterm"
    master, slave = pty.openpty()
    again = Up(tmp_path, config, terminal=slave)
    os.close(slave)
    shown = _read_until(lambda: again.reached(saved + 1), master, again)
    os.close(master)  # the kernel sends SIGHUP to every process in the terminal's foreground
    assert again.wait() == 0, again.events()
    assert b"budget" in shown
    assert again.events()[-1]["kind"] == "drain"
    assert again.iterations()[-1]["iteration"] < 50
    _assert_old_parts_are_gone(again)
    rates = [record["learner/lr"] for record in again.iterations()]
    assert all(later < earlier for earlier, later in pairwise(rates)), rates


def _assert_old_parts_are_gone(up: Up) -> None:
    """The newest part, and those that a kept checkpoint is replayed with."""
    oldest = oldest_manifest(up.run / "checkpoints")
    assert oldest is not None and oldest.iteration >= 1
    newest = up.iterations()[-1]["iteration"]
    wanted = {newest, *range(oldest.iteration + 1, newest + 1)}
    assert {part_iteration(path) for path in parts(up.run)} == wanted


def _read_until(reached: Callable[[], bool], master: int, up: Up) -> bytes:
    """What a terminal of 20 columns shows meanwhile; it must be read, or the run would wait for it."""
    os.set_blocking(master, False)
    shown, deadline = b"", time.monotonic() + 150.0
    while not reached():
        assert up.process.poll() is None and time.monotonic() < deadline, shown[-2000:]
        try:
            shown += os.read(master, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
    return shown
