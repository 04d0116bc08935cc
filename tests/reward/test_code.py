"""The code reward: programs and tests as data sets and models write them, and what each outcome means."""

from __future__ import annotations

import json
import time
from typing import Any

import psutil
import pytest

from pmdflow.config.schema import RewardConfig
from pmdflow.errors import PmdflowError
from pmdflow.reward.code import Case, extract_program, read_cases
from pmdflow.reward.item import ScoreItem
from pmdflow.reward.rubric import InvalidCompletion
from pmdflow.reward.runner import RewardRunner
from tests.support.reward import needs_sandbox, programs_below

ADD = [{"input": "1 2", "output": "3"}, "assert add(2, 2) == 4\nassert add(0, 1) == 1"]
GOOD = """
def add(a, b):
    return a + b
import sys
if sys.argv[0] == "main.py":
    print(add(*map(int, input().split())))
"""


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\n```py\nx = 2\n```", "x = 2\n"),
        ("<think>```python\nx = 1\n```</think>\n```Python3 title\nx = 2\n\n```", "x = 2\n\n"),
        ("1. First\n   ```python\n   if x:\n       y = 1\n   ```", "if x:\n    y = 1\n"),
        ("```python\nprint('``` is no end')\n```", "print('``` is no end')\n"),
    ],
)
def test_the_program_is_the_last_block(completion: str, program: str) -> None:
    assert extract_program(completion) == program


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("", "no program"),
        ("x = 1", "no program"),
        ("```python\nx = 1", "no program"),
        ("```python\nx = 1\n```\n```rust\nfn main() {}\n```", "rust, not in Python"),
        ("<think>\n```python\nx = 1\n```\n</think> done", "no program"),
    ],
)
def test_no_program_is_invalid(completion: str, message: str) -> None:
    with pytest.raises(InvalidCompletion, match=message):
        extract_program(completion)


def test_tests_come_in_the_forms_of_data_sets() -> None:
    cases = [Case(stdin="1", stdout="2"), Case(stdin="3", stdout="4")]
    pairs = [{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]
    columns = {"inputs": ["1", "3"], "outputs": ["2", "4"], "fn_name": None}
    for tests in (pairs, columns, json.dumps(pairs), json.dumps(columns)):
        assert read_cases({"tests": tests}) == cases
    lines = {"inputs": [["1", "2"], 3], "outputs": [["2"], 4.5]}
    assert read_cases({"tests": lines}) == [Case(stdin="1\n2", stdout="2"), Case(stdin="3", stdout="4.5")]
    assert read_cases({"tests": ["assert f() == 1"]}) == [Case(asserts="assert f() == 1")]


CALLED = {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}
"""As APPS has them, beside those of standard input."""


@pytest.mark.parametrize(
    "tests",
    [
        None, [], "not JSON", "[]", [{"input": "1"}], [3], {"inputs": ["1"], "outputs": []}, CALLED,
        json.dumps(CALLED), [{"input": {"a": 1}, "output": "1"}], [{"input": [1, 2], "output": "3"}],
    ],
)  # fmt: skip
def test_a_task_without_tests_is_named(tests: Any) -> None:
    with pytest.raises(ValueError, match="'tests'"):
        read_cases({"tests": tests})


@needs_sandbox
@pytest.mark.timeout(180)
def test_right_wrong_hostile_and_broken_are_told_apart() -> None:
    """Through the killable subprocess, as in a run."""
    entry = {"function": "pmdflow.reward.code:score", "args": {"time_limit_s": 1}}
    config = RewardConfig.model_validate({"functions": [entry], "timeout_s": 12.0, "invalid": -0.5})
    programs = [GOOD, GOOD.replace("a + b", "a - b"), "while True: pass", "import os\nos.kill(os.getppid(), 9)"]
    completions = [f"```python\n{program}\n```" for program in programs]
    with RewardRunner(config) as runner:
        scored = runner.map(
            [
                *(ScoreItem(completion=text, prompt="?", metadata={"tests": ADD}) for text in completions),
                ScoreItem(completion="no program", prompt="?", metadata={"tests": ADD}),
                ScoreItem(completion=completions[0], prompt="?"),
            ]
        )
    assert [(one.outcome, one.reward) for one in scored] == [
        ("scored", 1.0), ("scored", 0.0), ("scored", 0.0), ("scored", 0.0), ("invalid", -0.5), ("infra_failure", 0.0),
    ]  # fmt: skip
    assert "lacks 'tests'" in scored[-1].message


@needs_sandbox
@pytest.mark.timeout(180)
def test_a_program_dies_with_the_subprocess_that_runs_it_and_sees_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PMDFLOW_TEST_SECRET", "secret")
    entry = {"function": "pmdflow.reward.code:score", "args": {"time_limit_s": 60}}
    config = RewardConfig.model_validate({"functions": [entry], "timeout_s": 600.0})
    with RewardRunner(config) as runner:
        future = runner.submit(
            ScoreItem(completion="```python\nimport time\ntime.sleep(600)\n```", prompt="?", metadata={"tests": ADD})
        )
        worker = psutil.Process(runner._workers[0].pid)
        deadline = time.monotonic() + 60
        while not (inside := programs_below(worker)):
            assert time.monotonic() < deadline, "the program did not start"
            time.sleep(0.05)
        everything = worker.children(recursive=True)
        assert "PMDFLOW_TEST_SECRET" in worker.environ()
        assert not any("PMDFLOW_TEST_SECRET" in process.environ() for process in everything)
    assert inside
    assert psutil.wait_procs(everything, timeout=20)[1] == []
    assert isinstance(future.exception(timeout=10), PmdflowError)
