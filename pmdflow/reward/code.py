"""Programs, judged by running them against tests in a sandbox."""

from __future__ import annotations

import json
import re
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import dedent
from typing import Any, Literal

from pmdflow.reward.attendance import Ended
from pmdflow.reward.confinement import PYTHON, UNCONFINED
from pmdflow.reward.rubric import InvalidCompletion
from pmdflow.reward.sandbox import Limits, Sandbox, find_sandbox

TIME_SHARE = 0.8
"""Share of `reward.timeout_s` for all tests together; the rest is for starting and ending them."""
LEAST_S = 0.5
"""With less time left, no test is begun."""
DETAIL_CHARS = 500
"""Kept of the end of what a failed test said."""

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_LANGUAGES = ("", "py", "python", "python3")
_MAIN = "main.py"
_ASSERTING = """
import os, sys
scope = {"__name__": "__main__"}
with open("main.py") as file:
    exec(compile(file.read(), "main.py", "exec"), scope)
sign, _, tests = sys.stdin.read().partition("\\n")
exec(compile(tests, "tests", "exec"), scope)
sys.stdout.flush()
os.write(1, sign.encode())
os._exit(0)
"""
"""The sign of success is not there to be found before the program's own text has run, nor if it leaves early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a program must do: answer `stdin` with `stdout`, or bear `asserts`."""

    stdin: str = ""
    stdout: str = ""
    asserts: str = ""
    """Python statements that run after the program, in its namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a program."""

    kind: Literal["passed", "wrong", "crashed", "timeout", "output"]
    """`wrong`: it ended well with another answer; `crashed`: by an error or a signal; `output`: too much of it."""
    case: int = 0
    """The first case that failed."""
    detail: str = ""
    """The end of what it said then."""


def score(
    *,
    completion: str,
    metadata: Mapping[str, Any],
    timeout_s: float,
    time_limit_s: float = 4.0,
    memory_mib: int = 1024,
    sandbox: Literal["required", "none"] = "required",
) -> float:
    """1.0 if the program passes every test of `metadata["tests"]`, else 0.0.

    The program is the last fenced block of the completion, in Python. It runs in a sandbox once for each test.

    Args:
        completion: Generated text; what comes before `</think>` is not looked at.
        metadata: `tests`, see `read_cases`.
        timeout_s: `reward.timeout_s`, which bounds all tests together.
        time_limit_s: CPU time of each test.
        memory_mib: Memory of each process of the program.
        sandbox: `none` runs programs with limits but without walls, where every program is trusted.

    Raises:
        InvalidCompletion: there is no program.
        ValueError: the metadata has no tests that can be read.
        SandboxFailed: this machine cannot confine programs, or a sandbox did not start.
        TimeoutError: the tests need more than `reward.timeout_s`, though no single one does.
    """
    cases = read_cases(metadata)
    verdict = run_cases(
        extract_program(completion),
        cases,
        sandbox=Sandbox(confinement=UNCONFINED) if sandbox == "none" else find_sandbox(),
        wall_s=TIME_SHARE * timeout_s,
        time_limit_s=time_limit_s,
        memory_bytes=memory_mib << 20,
    )
    return float(verdict.kind == "passed")


def extract_program(completion: str) -> str:
    """The last fenced block of the answer, without the indentation of a list that it stands in.

    Raises:
        InvalidCompletion: there is none, or it is not in Python.
    """
    blocks = _FENCE.findall(completion.rpartition("</think>")[2])
    if not blocks:
        raise InvalidCompletion("no program: a fenced block (```python) holds it")
    language, program = blocks[-1]
    if language.lower() not in _LANGUAGES:
        raise InvalidCompletion(f"the last block is in {language:.20}, not in Python")
    return dedent(program) if program[:1].isspace() else str(program)


def read_cases(metadata: Mapping[str, Any]) -> list[Case]:
    """The tests of a task.

    `tests` is a list, each `{"input": ..., "output": ...}` or Python text with `assert` statements; or one mapping
    `{"inputs": [...], "outputs": [...]}`; or either as JSON. Input and output are texts or lists of lines. Standard
    output is compared line by line, without trailing blanks. Statements run in the program's own process, which could
    pretend that they held if it knew this module; output cannot be pretended.

    Raises:
        ValueError: there are none, or they have another form.

    Example:
        >>> read_cases({"tests": [{"input": "1 2", "output": "3"}, "assert add(1, 2) == 3"]})[1].asserts
        'assert add(1, 2) == 3'
    """
    tests = metadata.get("tests")
    try:
        if isinstance(tests, str):
            tests = json.loads(tests)
        if isinstance(tests, Mapping):
            if tests.get("fn_name"):
                raise ValueError(f"tests call {tests['fn_name']!r}, which is not read: write them as assert statements")
            tests = [
                {"input": given, "output": expected}
                for given, expected in zip(tests["inputs"], tests["outputs"], strict=True)
            ]
        cases = [
            Case(asserts=test)
            if isinstance(test, str)
            else Case(stdin=_text(test["input"]), stdout=_text(test["output"]))
            for test in tests or []
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"metadata['tests'] is {tests!r:.80}: {type(error).__name__}: {error}") from error
    if not cases:
        raise ValueError("metadata lacks 'tests': pmdflow.reward.code runs programs against them; name the column so")
    return cases


def _text(value: Any) -> str:
    """What goes through a program's standard stream: a text, a number, or a list of lines."""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise TypeError(f"{value!r:.80} is no text")


def run_cases(
    program: str, cases: Sequence[Case], *, sandbox: Sandbox, wall_s: float, time_limit_s: float, memory_bytes: int
) -> Verdict:
    """Run a program on each case, up to the first that fails.

    Raises:
        SandboxFailed: a sandbox did not start.
        TimeoutError: `wall_s` is over before a case has had `time_limit_s`, or half of `wall_s`.
    """
    deadline = time.monotonic() + wall_s
    too_many = TimeoutError(f"{len(cases)} tests need more than {wall_s:g} s together: raise reward.timeout_s")
    for number, case in enumerate(cases):
        left_s = deadline - time.monotonic()
        if left_s < LEAST_S:
            raise too_many
        sign = secrets.token_hex(16)
        limits = Limits(wall_s=left_s, cpu_s=max(round(time_limit_s), 1), memory_bytes=memory_bytes)
        ended = _run(program, case, sign, sandbox, limits)
        if _was_cut(ended) and (ended.wall_s or 0.0) < min(time_limit_s, wall_s / 2):
            raise too_many
        kind = _judge(ended, case, sign)
        if kind != "passed":
            said = (ended.stderr or ended.stdout).decode(errors="replace")
            return Verdict(kind=kind, case=number, detail=said[-DETAIL_CHARS:])
    return Verdict(kind="passed")


def _run(program: str, case: Case, sign: str, sandbox: Sandbox, limits: Limits) -> Ended:
    argv = ["-c", _ASSERTING] if case.asserts else [_MAIN]
    stdin = f"{sign}\n{case.asserts}" if case.asserts else case.stdin
    data = stdin.encode(errors="surrogatepass")
    return sandbox.run([PYTHON, "-I", "-B", *argv], files={_MAIN: program}, stdin=data, limits=limits)


def _was_cut(ended: Ended) -> bool:
    """Whether its wall time was over, as against its CPU time."""
    return ended.how == "timeout" and ended.status != signal.SIGXCPU


def _judge(ended: Ended, case: Case, sign: str) -> Literal["passed", "wrong", "crashed", "timeout", "output"]:
    if ended.how == "timeout" or ended.how == "output":
        return ended.how
    if ended.how == "signal" or ended.status != 0:
        failed = case.asserts and ended.stderr.rstrip().rpartition(b"\n")[2].startswith(b"AssertionError")
        return "wrong" if failed else "crashed"
    if case.asserts:
        return "passed" if ended.stdout.endswith(sign.encode()) else "wrong"
    return "passed" if _lines(ended.stdout.decode(errors="replace")) == _lines(case.stdout) else "wrong"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
