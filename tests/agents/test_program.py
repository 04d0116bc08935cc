"""Agent programs as processes: their ends, their deadlines, and what they leave behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pmdflow.agents.program import Program

LEAKS = """
import os, subprocess, sys, time
for _ in range(3):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
print("started", flush=True)
time.sleep(float(sys.argv[1]))
"""


def start(tmp_path: Path, *argv: str, timeout_s: float = 30.0, **task: Any) -> Program:
    return Program.start(
        argv, env={"MARK": str(tmp_path)}, task=task, work=tmp_path / "work", log=tmp_path / "log", timeout_s=timeout_s
    )


def marked(tmp_path: Path) -> list[psutil.Process]:
    """Processes with this test's variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == str(tmp_path) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def test_it_finds_its_task_and_leaves_its_reward(tmp_path: Path) -> None:
    code = (
        "import json, os, sys; task = json.load(sys.stdin); print(task['prompt'], os.getcwd());"
        "open(os.environ['PMDFLOW_REWARD_FILE'], 'w').write('0.25')"
    )
    program = start(tmp_path, sys.executable, "-c", code, prompt="1 + 2" * 100_000)
    assert program.ended.result(timeout=30) == ""
    assert program.rewards == {"reward": 0.25}
    assert (tmp_path / "log").read_text() == f"{'1 + 2' * 100_000} {tmp_path / 'work'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise SystemExit('no model')", "exit code 1; it said: 'no model'"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("open(__import__('os').environ['PMDFLOW_REWARD_FILE'], 'w').write('much')", "its reward file"),
    ],
)
def test_its_failure_is_told(tmp_path: Path, code: str, problem: str) -> None:
    assert problem in start(tmp_path, sys.executable, "-c", code).ended.result(timeout=30)


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "No such file" in start(tmp_path, "/no/such/program").ended.result(timeout=30)


@pytest.mark.parametrize("how", ["ends", "deadline", "kill"])
def test_nothing_that_it_started_outlives_it(tmp_path: Path, how: str) -> None:
    program = start(
        tmp_path, sys.executable, "-c", LEAKS, "0.2" if how == "ends" else "600",
        timeout_s=1.5 if how == "deadline" else 60.0,
    )  # fmt: skip
    if how == "kill":
        deadline = time.monotonic() + 30
        while len(marked(tmp_path)) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        program.kill()
    problem = program.ended.result(timeout=40)
    expected = {"ends": "", "deadline": "did not end within 1.5 s", "kill": "killed"}[how]
    assert expected in problem
    assert marked(tmp_path) == []
    assert not (tmp_path / "work").exists()


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pmdflow.agents.program import Program;"
        f"Program.start([sys.executable, '-c', {LEAKS!r}, '600'], env={{'MARK': {str(tmp_path)!r}}}, task={{}},"
        f"work=Path({str(tmp_path / 'work')!r}), log=Path({str(tmp_path / 'log')!r}), timeout_s=600); time.sleep(600)"
    )
    owner = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(marked(tmp_path)) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    while (marked(tmp_path) or (tmp_path / "work").exists()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert marked(tmp_path) == []
    assert not (tmp_path / "work").exists()
