"""Every command and snippet of the guides on leaving with a model, sinks and the library does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel
from typer.testing import CliRunner

import pmdflow
from pmdflow.cli import app
from pmdflow.config.schema import Config
from tests.support.guides import Step, steps
from tests.support.hub_uploads import HubUploads
from tests.support.paths import ROOT
from tests.support.runs import small_config
from tests.support.sinks import environment
from tests.support.trained_run import TrainedRun

EXPORT, SINKS, LIBRARY = (
    ROOT / "pmdflow" / name for name in ("export/EXPORT.md", "metrics/sinks/SINKS.md", "library/LIBRARY.md")
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `runs/quickstart` and `runs/lora`."""
    directory = tmp_path_factory.mktemp("desk")
    for name, learner in (("quickstart", {}), ("lora", {"learner__lora": {"rank": 4}})):
        with TrainedRun(directory, run__name=name, **learner) as run:
            run.train(2)
    return directory


def commands(guide: Path) -> list[Step]:
    return [step for step in steps(guide) if step.language == "command"]


def run_apart(step: Step, desk: Path, variables: dict[str, str]) -> None:
    """In a process that has these variables."""
    done = subprocess.run(
        [sys.executable, "-m", "pmdflow.cli", *step.arguments],
        cwd=desk, env=variables | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{step.text}\n{done.stdout}{done.stderr}"


def run_python(guide: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(desk)
    names: dict[str, Any] = {}
    for step in steps(guide):
        if step.language == "python":
            exec(step.text, names)
    return names


def test_leaving_with_a_model(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    assert len(commands(EXPORT)) == 6
    with HubUploads(desk / "home") as hub:
        for step in commands(EXPORT):
            if "--push" in step.arguments:
                run_apart(step, desk, os.environ | hub.environment)
            else:
                arguments = ["1" if word == "35" else word for word in step.arguments]  # this run is a short one
                assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert hub.repositories["me/quickstart"].keys() == {path.name for path in (desk / "pushed").iterdir()}
    names = run_python(EXPORT, desk, monkeypatch)
    assert names["model"].config.eos_token_id == names["tokenizer"].eos_token_id == 1
    assert isinstance(names["adapted"], PeftModel)


def test_metrics_where_you_look(desk: Path) -> None:
    sinks = yaml.safe_load(next(step.text for step in steps(SINKS) if step.language == "yaml"))
    config = Config.model_validate(small_config(desk, run__name="quickstart") | sinks)
    assert [sink.name for sink in config.metrics.sinks] == ["tensorboard", "wandb", "prometheus", "trackio"]
    (desk / "runs" / "quickstart" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert len(commands(SINKS)) == 3
    for step in commands(SINKS):
        run_apart(step, desk, environment(desk))
    for left in ("tensorboard", "wandb", "wandb.json", "trackio.json"):
        assert (desk / "runs" / "quickstart" / "sinks" / left).exists()


def test_a_run_from_python(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, ...]] = []  # what `up` really does is seen in tests/integration/test_library.py

    def up(*arguments: str) -> pmdflow.Run:
        trained.append(arguments)
        return pmdflow.open_run("runs/quickstart")

    monkeypatch.setattr(pmdflow, "up", up, raising=False)
    names = run_python(LIBRARY, desk, monkeypatch)
    assert trained == [("configs/quickstart.yaml", "run.iterations=3")]
    assert len(names["rewards"]) == 2 and len(names["held_out"]) == 3
    assert names["best"].iteration == 1 and names["solved"] is not None
    assert names["model"].config.model_type == "qwen3"
