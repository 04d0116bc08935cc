"""Programs that leave what they should not: each ends, says what went wrong, and nothing of it stays."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from pmdflow.agents.program import Program

REWARD = "import os, sys; path = os.environ['PMDFLOW_REWARD_FILE']; "


def run(tmp_path: Path, code: str) -> tuple[Program, str]:
    env = {"MARK": str(tmp_path), "OPENAI_API_KEY": "key-of-this-episode"}
    program = Program.start(
        [sys.executable, "-c", code], env=env, task={}, work=tmp_path / "work", log=tmp_path / "log", timeout_s=20.0
    )
    return program, program.ended.result(timeout=15.0)


@pytest.mark.parametrize(
    "code",
    [
        "os.mkfifo(path)",
        "os.mkdir(path)",
        "os.symlink('/dev/zero', path)",
        "open(path, 'w').write('1' + '0' * 400)",
        "open(path, 'w').write('[' * 9999)",
        "open(path, 'wb').write(b'\\xff')",
        "open(path, 'w').write('{\"\\\\ud800\": 1}')",
        "open(path, 'w').write('1' * (4 << 20))",
    ],
)
def test_a_reward_file_that_is_none_is_said_and_removed(tmp_path: Path, code: str) -> None:
    program, problem = run(tmp_path, REWARD + code)
    assert "its reward file" in problem
    assert program.rewards == {}
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_a_program_started_ends_although_it_killed_its_keeper(tmp_path: Path) -> None:
    start = "import os, subprocess, sys, time; subprocess.Popen(['sleep', '600'], start_new_session=True); "
    _, problem = run(tmp_path, start + "os.kill(os.getppid(), 9); time.sleep(60)")
    assert "keeper" in problem
    deadline = time.monotonic() + 5
    while left := [process for process in psutil.process_iter() if marked(process, tmp_path)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def marked(process: psutil.Process, tmp_path: Path) -> bool:
    try:
        return process.environ().get("MARK") == str(tmp_path) and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def test_the_key_is_in_no_log_and_no_message(tmp_path: Path) -> None:
    said = "key = os.environ['OPENAI_API_KEY']; [os.write(1, part.encode()) for part in (key, ' ', key[:5], key[5:])]"
    _, problem = run(tmp_path, f"import os, time; {said}; sys")
    assert "NameError" in problem
    assert os.environ.get("OPENAI_API_KEY") != "key-of-this-episode"
    assert "key-of-this-episode" not in problem + (tmp_path / "log").read_text()
