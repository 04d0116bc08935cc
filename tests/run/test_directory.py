"""The run directory: who may have it, and what a resumed run may not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pmdflow.config.load import load
from pmdflow.config.recorded import RENAMED
from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError
from pmdflow.run.directory import RunDirectory
from tests.support.paths import CONFIGS


def small(runs: Path, *overrides: str) -> Config:
    return load(CONFIGS / "quickstart.yaml", [f"run.dir={runs}", "run.name=small", *overrides]).config


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that has a store already."""
    with RunDirectory.prepare(small(tmp_path)) as run:
        (run.path / "store").mkdir()
        return run.path


def test_a_resumed_run_keeps_model_data_and_seed(begun: Path) -> None:
    with RunDirectory.prepare(small(begun.parent, "run.iterations=99", "learner.lr=0.5")) as run:
        assert run.path == begun
    with pytest.raises(LaunchError, match=r"data is .* was begun with") as caught:
        RunDirectory.prepare(small(begun.parent, "data.group_size=3"))
    assert "another run.name" in str(caught.value.hint)


def test_a_run_of_an_older_version_is_resumed(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file has a former name, and lacks a key that has been added since with a default."""
    file = begun / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["data"]["most_tokens"] = settings["data"].pop("max_tokens")
    del settings["data"]["max_prompt_tokens"]
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setitem(RENAMED, "data.most_tokens", "data.max_tokens")
    with RunDirectory.prepare(small(begun.parent)):
        assert yaml.safe_load(file.read_text())["data"]["max_prompt_tokens"] == 4096


def test_a_directory_in_use_names_its_owner(begun: Path) -> None:
    with RunDirectory.prepare(small(begun.parent)), pytest.raises(LaunchError, match="in use by process") as caught:
        RunDirectory.prepare(small(begun.parent))
    assert f"pmdflow down {begun}" in str(caught.value.hint)
