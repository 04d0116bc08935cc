"""Modules that a configuration names are found beside it, from anywhere, and by whoever reads the run afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pmdflow.config.imports import load_named, locate
from pmdflow.config.installed import require_imports
from pmdflow.config.load import load, load_run
from pmdflow.reward.rubric import load_rubric
from tests.support.config import MINIMAL

NAMED = {
    "reward": {"functions": [{"function": "judged_here:score"}, {"function": "pmdflow.reward.math:score"}]},
    "environment": {"factory": "package_here.tools:make"},
    "learner": {"algorithm": "judged_here:algorithm"},
    "eval": {"sets": {"x": {"task": "reasoning_gym/gcd", "prompts": 1, "reward": [{"function": "judged_here:score"}]}}},
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a configuration and the modules that it names, which import each other."""
    (tmp_path / "package_here").mkdir()
    (tmp_path / "package_here" / "tools.py").write_text("def make(): ...\n")
    (tmp_path / "beside_here.py").write_text("BASE = 40\n")
    (tmp_path / "judged_here.py").write_text(
        "from beside_here import BASE\nalgorithm = 1\n\n\n"
        "def score(*, completion):\n    return BASE + len(completion)\n"
    )
    settings: dict[str, Any] = yaml.safe_load(MINIMAL)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**settings, **NAMED}))
    return tmp_path


def test_every_setting_that_names_a_module_says_where_it_was_found(job: Path) -> None:
    config = load(job / "job.yaml").config
    assert config.reward.functions[0].function == f"{job}:judged_here:score"
    assert config.reward.functions[1].function == "pmdflow.reward.math:score"
    assert config.environment is not None and config.environment.factory == f"{job}:package_here.tools:make"
    assert config.learner.algorithm == f"{job}:judged_here:algorithm"
    reward = config.eval.sets["x"].reward
    assert reward is not None and reward[0].function == f"{job}:judged_here:score"
    require_imports(load(job / "job.yaml"))


def test_the_current_directory_comes_first_and_the_standard_library_is_never_elsewhere(
    job: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "judged_here.py").touch()
    (here / "math.py").touch()
    monkeypatch.chdir(here)
    assert load(job / "job.yaml").config.reward.functions[0].function == f"{here}:judged_here:score"
    assert locate("math:sqrt", [Path()]) == "math:sqrt"
    assert locate("nowhere:score", [here]) == "nowhere:score"


def test_whoever_reads_the_run_finds_the_module_again(job: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text(yaml.safe_dump(load(job / "job.yaml").config.model_dump(mode="json")))
    code = (
        "import asyncio, sys; from pmdflow.config.load import load_run; from pmdflow.reward.rubric import load_rubric\n"
        "rubric = load_rubric(load_run(sys.argv[1]).config.reward)\n"
        "print(rubric.names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], cwd="/", capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "('judged_here.score', 'math.score')"
    assert load_run(run).config == load(job / "job.yaml").config


def test_a_module_finds_those_beside_it(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_named(f"{job}:judged_here:score")(completion="ab") == 42
    assert load_rubric(load(job / "job.yaml").config.reward).names[0] == "judged_here.score"
