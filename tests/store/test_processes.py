"""What the operating system does to the process that has a store: forks, signals, cut files, failing disks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.crash_processes import TOKENS
from tests.support.paths import SUPPORT

PROGRAM = [sys.executable, str(SUPPORT / "crash_processes.py")]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


def outcome(*program: Any) -> Any:
    """What a program says, which must end well and without a word of complaint."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # all threads are the store's
    ended = subprocess.run([str(part) for part in program], env=env, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


@pytest.mark.parametrize("durability", ["os", "group", "always"])
def test_a_forked_child_is_refused_and_changes_nothing(tmp_path: Path, durability: str) -> None:
    seen = outcome(*PROGRAM, "fork", tmp_path / "store", durability)
    assert all(re.search(r"opened before a fork, by process \d+.*use it there", told) for told in seen["told"])
    assert seen["tokens"] == list(range(300))
    assert seen["status"] == 0


def test_a_file_cut_under_an_open_store_is_an_error(tmp_path: Path) -> None:
    told = outcome(*PROGRAM, "cut", tmp_path / "store")
    assert len(told) == 2
    assert all(re.search(r"store/\d+\.log is damaged at byte \d+: \d+ bytes of a record are beyond", t) for t in told)


@needs_strace
def test_a_disk_that_cannot_read_is_an_error_with_file_and_offset(tmp_path: Path) -> None:
    log = tmp_path / "strace"
    with subprocess.Popen(
        [*PROGRAM, "unreadable", str(tmp_path / "store")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        inject = ["-e", "inject=madvise:error=EFAULT", "-e", "inject=pread64:error=EIO"]
        attach = ["strace", "-f", "-p", str(process.pid), "-o", str(log), "-e", "trace=madvise,pread64", *inject]
        with subprocess.Popen(attach, stderr=subprocess.PIPE, text=True) as strace:
            if "attached" not in strace.stderr.readline():
                process.kill()
                pytest.skip("needs the right to trace")
            process.stdin.write("\n")
            process.stdin.close()
            told = json.loads(process.stdout.readline())
            process.wait()
    assert process.returncode == 0
    assert re.search(r"store/\d+\.log: \d+ bytes at byte \d+ cannot be read: Input/output error", told)


@needs_strace
def test_a_store_without_threads_does_without_what_they_are_for(tmp_path: Path) -> None:
    log, calls = tmp_path / "strace", "clone,clone3"
    strace = ["strace", "-f", "-o", log, "-e", f"trace={calls}", "-e", f"inject={calls}:error=EAGAIN"]
    tokens, files = outcome(*strace, *PROGRAM, "grow", tmp_path / "store", "os")
    assert (tokens, files > 3) == (4 * TOKENS, True)
    assert log.read_text().count("INJECTED") > 1


@needs_strace
def test_a_signal_that_interrupts_an_allocation_harms_nothing(tmp_path: Path) -> None:
    log = tmp_path / "strace"
    strace = ["strace", "-f", "-o", log, "-e", "trace=fallocate", "-e", "inject=fallocate:error=EINTR:when=1+2"]
    tokens, files = outcome(*strace, *PROGRAM, "grow", tmp_path / "store")
    assert (tokens, files > 3) == (4 * TOKENS, True)
    assert log.read_text().count("INJECTED") > 3


def synced(log: Path, *program: Any) -> set[str]:
    """What a program syncs."""
    outcome("strace", "-f", "-y", "-o", log, "-e", "trace=fsync,fdatasync", *program)
    return set(re.findall(r"<([^>]+)>\) += 0", log.read_text()))


@needs_strace
def test_a_new_store_syncs_the_names_above_it(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made = synced(tmp_path / "strace", *PROGRAM, "grow", runs / "one" / "store")
    assert made >= {str(tmp_path), str(runs), str(runs / "one")}


@needs_strace
def test_directories_are_made_with_names_that_stay(tmp_path: Path) -> None:
    program = "import sys, pathlib, pmdflow.durable as d; d.make_directories(pathlib.Path(sys.argv[1])); print(1)"
    make = (tmp_path / "strace", sys.executable, "-c", program, tmp_path / "a" / "b")
    assert synced(*make) == {str(tmp_path), str(tmp_path / "a")}
    assert synced(*make) == {str(tmp_path / "a")}, "an earlier process may have died before it did"
