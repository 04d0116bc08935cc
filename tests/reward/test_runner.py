"""Reward subprocesses that hang, crash and lie."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmdflow.config.sources import RewardFunctionConfig
from pmdflow.errors import PmdflowError
from pmdflow.reward.item import ScoreItem
from pmdflow.reward.runner import RewardRunner
from tests.support.reward import items, make_config


@pytest.mark.usefixtures("functions")
def test_results_come_in_order() -> None:
    with RewardRunner(make_config(workers=2)) as runner:
        scored = runner.map(items(*(str(number) for number in range(500))))
        assert [result.reward for result in scored] == [float(number) for number in range(500)]
        assert runner.map([]) == []
        kinds = runner.map(items("1", "invalid", "nan", "raise", "\ud800"))
        assert [result.outcome for result in kinds] == ["scored", "invalid", *["infra_failure"] * 3]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("default", ["graders:obey", "graders:obey_together"])
def test_a_source_is_judged_by_its_own_functions(default: str) -> None:
    own = {"words": [RewardFunctionConfig(function="graders:length", weight=2.0)]}
    with RewardRunner(make_config(default), own) as runner:
        sources = [{"prompt_source": "words"}, {"prompt_source": "numbers"}, {}]
        made = [ScoreItem(completion="12345", prompt="?", metadata=metadata) for metadata in sources]
        scored = runner.map(made)
    assert [result.reward for result in scored] == [10.0, 12345.0, 12345.0]
    assert list(scored[0].components) == ["graders.length"]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("sleep", "timed out after 1 s"),
        ("spin", "timed out after 1 s"),
        ("freeze", "timed out after 1 s"),
        ("exit", "exit code 3"),
        ("kill", "signal 9"),
    ],
)
def test_a_lost_item_is_an_infra_failure_and_its_batch_goes_on(completion: str, message: str) -> None:
    with RewardRunner(make_config()) as runner:
        scored = runner.map(items("1", "2", completion, "3", "4"))
        assert [result.outcome for result in scored] == ["scored", "scored", "infra_failure", "scored", "scored"]
        assert [result.reward for result in scored] == [1.0, 2.0, 0.0, 3.0, 4.0]
        assert message in scored[2].message


@pytest.mark.usefixtures("functions")
def test_the_limit_is_for_one_item_not_for_its_batch(functions: Path) -> None:
    (functions / "slow.py").write_text(
        "import time\ndef f(*, completion, prompt, metadata):\n    time.sleep(0.4)\n    return 1\n"
    )
    with RewardRunner(make_config("slow:f")) as runner:
        assert [result.outcome for result in runner.map(items(*"abcdef"))] == ["scored"] * 6


def test_what_a_killed_function_started_dies_with_it(functions: Path) -> None:
    pid_file = functions / "pid"
    with RewardRunner(make_config()) as runner:
        (scored,) = runner.map(items("child", pid_file=str(pid_file)))
    assert "timed out" in scored.message
    assert not is_alive(int(pid_file.read_text()))


@pytest.mark.usefixtures("functions")
def test_a_rubric_that_cannot_be_imported_is_a_start_error() -> None:
    with pytest.raises(ValueError, match="did you mean 'obey'"):
        RewardRunner(make_config("graders:obay", workers=2))


def test_a_crash_or_a_hang_of_the_import_is_a_start_error(functions: Path) -> None:
    (functions / "crash.py").write_text("import os\nos._exit(7)\n")
    (functions / "hang.py").write_text("import time\ntime.sleep(3600)\n")
    with pytest.raises(PmdflowError, match=r"exit code 7.*crash:f"):
        RewardRunner(make_config("crash:f"))
    with pytest.raises(PmdflowError, match=r"timed out.*hang:f"):
        RewardRunner(make_config("hang:f"), start_timeout_s=2.0)


def test_restarts_that_keep_failing_end_the_runner(functions: Path) -> None:
    (functions / "once.py").write_text(
        "import os, pathlib\n"
        "flag = pathlib.Path(__file__).with_name('started')\n"
        "if flag.exists():\n    os._exit(5)\n"
        "flag.touch()\n"
        "def f(*, completion, prompt, metadata):\n    os._exit(4)\n"
    )
    with RewardRunner(make_config("once:f")) as runner:
        first, second = (runner.submit(item) for item in items("a", "b"))
        assert "exit code 4" in first.result(timeout=30).message
        with pytest.raises(PmdflowError, match=r"exit code 5.*once:f"):
            second.result(timeout=60)
        with pytest.raises(PmdflowError):
            runner.submit(items("c")[0])


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("function", ["graders:obey_together", "graders:obey_in_batches"])
@pytest.mark.parametrize(("completion", "message"), [("sleep", "timed out after 1 s"), ("exit", "exit code 3")])
def test_innocents_of_a_killed_process_do_not_fail(function: str, completion: str, message: str) -> None:
    """Many run in one process; only the one that fails by itself as well is charged."""
    numbers = [str(number) for number in range(20)]
    with RewardRunner(make_config(function, max_failures_in_a_row=2)) as runner:
        assert runner.is_concurrent
        scored = runner.map(items(*numbers[:10], completion, *numbers[10:]))
        guilty = scored.pop(10)
        assert [result.outcome for result in scored] == ["scored"] * 20
        assert [result.reward for result in scored] == [float(number) for number in numbers]
        assert (guilty.outcome, message in guilty.message) == ("infra_failure", True)


@pytest.mark.usefixtures("functions")
def test_a_coroutine_that_waits_too_long_is_ended_without_a_kill() -> None:
    with RewardRunner(make_config("graders:obey_together")) as runner:
        pid = runner._workers[0].pid
        scored = runner.map(items("1", "wait", "2"))
        assert [result.outcome for result in scored] == ["scored", "infra_failure", "scored"]
        assert scored[1].message == "timed out after 1 s"
        assert runner._workers[0].pid == pid


@pytest.mark.usefixtures("functions")
def test_failures_in_a_row_end_the_runner_with_the_first_error() -> None:
    with RewardRunner(make_config(max_failures_in_a_row=4)) as runner:
        kinds = [result.outcome for result in runner.map(items("raise", "none", "nan", "invalid", "raise", "raise"))]
        assert kinds == ["infra_failure"] * 3 + ["invalid"] + ["infra_failure"] * 2
        futures = [runner.submit(item) for item in items("none", "text", "1")]
        assert [future.result(timeout=30).outcome for future in futures[:2]] == ["infra_failure"] * 2
        ended = r"4 scorings in a row failed .*the first: .*KeyError: 'oops'; the last: .*'1\.0'"
        with pytest.raises(PmdflowError, match=ended):
            futures[2].result(timeout=30)
        with pytest.raises(PmdflowError, match=ended):
            runner.submit(items("1")[0])


@pytest.mark.usefixtures("functions")
def test_a_source_whose_functions_always_fail_ends_the_runner_beside_one_whose_do_not() -> None:
    own = {"texts": make_config("graders:obey").functions}
    with RewardRunner(make_config(max_failures_in_a_row=3), own) as runner:
        mixed = [item for _ in range(2) for item in (*items("1"), *items("raise", prompt_source="texts"))]
        assert [scored.outcome for scored in runner.map(mixed)] == ["scored", "infra_failure"] * 2
        assert runner.map(items("none", prompt_source="sums"))[0].outcome == "infra_failure", "of the general functions"
        (last,) = items("raise", prompt_source="texts")
        assert runner.submit(last).result(timeout=30).outcome == "infra_failure"
        with pytest.raises(PmdflowError, match=r"3 scorings of texts in a row failed .*the first: .*KeyError: 'oops'"):
            runner.map(items("1"))


@pytest.mark.usefixtures("functions")
def test_close_fails_what_is_not_scored_and_leaves_no_process() -> None:
    runner = RewardRunner(make_config(timeout_s=600.0))
    futures = [runner.submit(item) for item in items("sleep", "1")]
    runner.close()
    runner.close()
    for future in futures:
        with pytest.raises(PmdflowError, match="closed"):
            future.result(timeout=5)
    with pytest.raises(PmdflowError, match="closed"):
        runner.submit(items("1")[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the children of a killed process on Linux only")
def test_subprocesses_die_with_a_killed_parent(functions: Path) -> None:
    """Even one that never looks at its input again."""
    script = (
        "import sys\n"
        "from pmdflow.config.schema import RewardConfig\n"
        "from pmdflow.reward.item import ScoreItem\n"
        "from pmdflow.reward.runner import RewardRunner\n"
        "config = RewardConfig(functions=[{'function': 'graders:obey'}], timeout_s=600)\n"
        "runner = RewardRunner(config)\n"
        "future = runner.submit(ScoreItem(completion='spin', prompt=''))\n"
        "print(runner._workers[0].pid, flush=True)\n"
        "future.result(timeout=600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(functions), *filter(None, sys.path)])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(next(line for line in parent.stdout if line.strip().isdigit()))
        os.kill(pid, 0)
        parent.kill()
    assert not is_alive(pid)


def is_alive(pid: int, *, within_s: float = 10.0) -> bool:
    """Whether process `pid` outlives the time it takes to be seen dead (zombies are dead)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state in "ZX":
            return False
        time.sleep(0.02)
    return True
