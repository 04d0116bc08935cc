"""Python as a tool: what it says, its limits, and that nothing is left of a program that tries to stay."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pmdflow.environments.python_tool import PythonTool
from pmdflow.errors import PmdflowError
from pmdflow.reward.sandbox import find_sandbox

MARK = "86402.0625"
"""Seconds that nobody else sleeps."""
LEAKS = f"""
import os, subprocess, sys
for _ in range(3):
    subprocess.Popen(["/usr/bin/env", "sleep", "{MARK}"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "{MARK}"])
print("left them", flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> None:
    try:
        find_sandbox()
    except PmdflowError as error:
        pytest.skip(f"no sandbox here: {error}")


def say(program: str, **settings: float) -> str:
    answer = PythonTool(**settings).step(key="", action=f"So: <python>{program}</python>")
    assert not answer.done and answer.metrics["python_calls"] == 1.0
    return answer.text.removeprefix("\n<output>\n").removesuffix("\n</output>\n")


def still_there() -> list[int]:
    """Processes of the machine that sleep so long."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] if MARK.encode() in path.read_bytes().split(b"\0") else []
        except OSError:
            continue
    return found


def test_it_says_what_a_program_says() -> None:
    assert say("print(6 * 7)") == "42"
    assert say("x = 1") == "(nothing)"
    assert say("print(1)\n1 / 0").endswith("ZeroDivisionError: division by zero")
    assert len(say("print('a' * 5000)", max_chars=100)) == 100
    assert PythonTool().step(key="", action="The answer is 42.").done
    assert PythonTool().step(key="", action="</python>").done


def test_one_that_does_not_end_is_ended() -> None:
    start = time.monotonic()
    assert say("print('so far', flush=True)\nwhile True: pass", time_limit_s=1.0).startswith("so far\nit was ended")
    assert time.monotonic() - start < 15


def test_processes_that_a_program_leaves_are_gone_when_it_is_answered() -> None:
    assert say(LEAKS).startswith("left them")
    deadline = time.monotonic() + 5
    while still_there() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert still_there() == []
