"""The configuration of an older run: its keys are read under the names that they have today."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.config.errors import ConfigError, fields_at
from pmdflow.config.load import load_run
from pmdflow.config.recorded import RENAMED, recorded_settings
from tests.support.config import MINIMAL, refuse


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory made when two keys had other names, one of them in another section."""
    monkeypatch.setitem(RENAMED, "learner.rate", "learner.lr")
    monkeypatch.setitem(RENAMED, "data.loops", "rollout.repetition")
    text = MINIMAL.replace("max_tokens: 64", "max_tokens: 64\n  loops: {copies: 5}") + "learner:\n  rate: 0.5\n"
    run = tmp_path / "old"
    run.mkdir()
    (run / "config.yaml").write_text(text)
    return run


def test_an_interval_has_been_renamed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL + "store:\n  commit_interval_s: 0.25\n")
    (issue,) = refuse(file)
    assert issue.message == "unknown key `store.commit_interval_s`"
    assert issue.hint == "it is called `store.sync_interval_s` now"
    loaded = load_run(tmp_path)
    assert loaded.config.store.sync_interval_s == 0.25
    assert loaded.origins["store.sync_interval_s"] == "config.yaml:16"
    assert load_run(tmp_path, ["store.sync_interval_s=1"]).config.store.sync_interval_s == 1


def test_renamed_keys_of_a_run_directory_are_read(old_run: Path) -> None:
    loaded = load_run(old_run, ["run.seed=3"])
    assert loaded.config.learner.lr == 0.5
    assert loaded.config.rollout.repetition is not None and loaded.config.rollout.repetition.copies == 5
    assert loaded.origins["learner.lr"] == "config.yaml:17"
    assert loaded.origins["rollout.repetition.copies"] == "config.yaml:9"
    assert loaded.origins["run.seed"] == "override"


def test_readers_of_plain_settings_see_the_present_names(old_run: Path) -> None:
    settings = recorded_settings(old_run)
    assert settings["learner"] == {"lr": 0.5}
    assert settings["rollout"] == {"repetition": {"copies": 5}}
    assert recorded_settings(old_run / "nowhere") == {}
    (old_run / "config.yaml").write_text("[")
    assert recorded_settings(old_run) == {}


def test_a_wrong_value_under_an_old_name_is_located(old_run: Path) -> None:
    file = old_run / "config.yaml"
    file.write_text(file.read_text().replace("0.5", "fast"))
    with pytest.raises(ConfigError) as caught:
        load_run(old_run)
    (issue,) = caught.value.issues
    assert (issue.place.line, issue.place.column) == (17, 9)
    assert "`learner.lr` must be a number" in issue.message


def test_in_a_users_file_and_in_overrides_an_old_name_is_a_mistake_that_is_explained(old_run: Path) -> None:
    hints = {issue.message: issue.hint for issue in refuse(old_run / "config.yaml")}
    assert hints["unknown key `learner.rate`"] == "it is called `learner.lr` now"
    with pytest.raises(ConfigError, match="it is called `learner"):
        load_run(old_run, ["learner.rate=0.1"])


def test_replay_reads_old_names(old_run: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(old_run)])
    assert "holds no claim" in str(result.exception)


def test_every_former_name_has_a_present_one() -> None:
    for old, new in RENAMED.items():
        (section, key), (present_section, present_key) = old.split("."), new.split(".")
        assert key not in fields_at((section,))
        assert present_key in fields_at((present_section,))
