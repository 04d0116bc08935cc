"""`pmdflow init`: what it writes is whole, runs, and never takes the place of something else."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.config.load import load
from pmdflow.errors import LaunchError
from pmdflow.init.command import BY_NAME, TemplateName, init
from pmdflow.reward.function import load_function
from pmdflow.run.inputs import dry_run
from tests.support.paths import CONFIGS


@pytest.mark.parametrize("name", get_args(TemplateName))
def test_a_template_is_a_shipped_configuration_and_what_it_names(name: TemplateName, tmp_path: Path) -> None:
    assert init(tmp_path / "new", name) == 0
    config = BY_NAME[name].config
    assert (tmp_path / "new" / config).read_bytes() == (CONFIGS / config).read_bytes()
    assert (tmp_path / "new" / "schema.json").is_file()
    for line in (tmp_path / "new" / config).read_text().splitlines():
        for needed in ("problems.jsonl", "own_reward"):
            assert needed not in line or list((tmp_path / "new").glob(f"{needed}*")), line


@pytest.mark.parametrize("name", ["quickstart", "k15", "tool"])
def test_what_needs_no_network_runs_at_once(
    name: TemplateName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    init(Path(), name)
    loaded = load(BY_NAME[name].config)
    assert Path(loaded.config.model.path).absolute().parent == tmp_path
    assert "nothing was started" in dry_run(loaded)


def test_a_second_time_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init"], catch_exceptions=False).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert CliRunner().invoke(app, ["init"], catch_exceptions=False).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_nothing_is_overwritten_and_then_nothing_is_written(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "quickstart.yaml").write_text("mine")
    elif kind == "folder":
        (tmp_path / "quickstart.yaml").mkdir()
    else:
        (tmp_path / "quickstart.yaml").symlink_to("nowhere")
    with pytest.raises(LaunchError, match=r"has quickstart\.yaml already.*nothing was written"):
        init(tmp_path, "quickstart")
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.yaml"]


def test_a_file_of_somebodys_that_is_named_like_a_temporary_one_stays(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml.tmp").write_text("mine")
    init(tmp_path, "quickstart")
    assert (tmp_path / "quickstart.yaml.tmp").read_text() == "mine"
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["quickstart.yaml.tmp"]


@pytest.mark.parametrize("name", ["new", "a b/my run", "-x", "$HOME;'"])
def test_the_commands_that_it_prints_are_for_a_shell(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    init(Path(name), "quickstart")
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert printed[1].endswith("&& pmdflow up quickstart.yaml") and (printed[1].startswith("cd new ") or name != "new")
    for command in printed:
        shell = f"pmdflow() {{ pwd; }}; {command}"
        done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()) == tmp_path / name


def test_a_place_that_cannot_be_a_folder_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"cannot write .*file: File exists"):
        init(tmp_path / "file", "quickstart")


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    done = CliRunner().invoke(app, ["--version"], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, f"pmdflow {version('pmdflow')}\n")


def test_the_sample_reward_takes_no_longer_number_for_the_answer() -> None:
    score = load_function(f"{CONFIGS}:own_reward:score")
    for row in map(json.loads, (CONFIGS / "problems.jsonl").read_text().splitlines()):
        said = {f"so it is {row['answer']}.": 1.0, f"so it is 1{row['answer']}": 0.0, "": 0.0}
        assert {text: score(completion=text, metadata=row) for text in said} == said
