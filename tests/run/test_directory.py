"""The run directory: who may have it, and what a resumed run may not change."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
import yaml

from pmdflow.config.errors import ConfigError
from pmdflow.config.load import load, load_run
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.dtype=bfloat16", r"model\.dtype is 'bfloat16', but .* was begun with 'float32'"),
        ("learner.lora={rank: 4}", r"learner\.lora is \{'rank': 4, .*\}, but .* was begun with None"),
        ("run.seed=9", r"run\.seed is 9, but .* was begun with 0"),
    ],
)
def test_what_checkpoints_and_trajectories_were_made_with_stays(begun: Path, change: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        RunDirectory.prepare(small(begun.parent, change))
    others = ("learner.ranks=2", "learner.algorithm=grpo", "scheduler.lookahead=1", "rollout.actors=2", "eval.every=3")
    with RunDirectory.prepare(small(begun.parent, *others)):
        pass


@pytest.mark.parametrize("text", ["", "run: {name: sm", "- a list\n", "run: {name: small}\n", "\x00\x00"])
def test_a_settings_file_that_was_cut_short_is_said_with_the_way_on(begun: Path, text: str) -> None:
    file = begun / "config.yaml"
    file.write_text(text)
    with pytest.raises(LaunchError, match=r"config\.yaml does not say any more") as caught:
        RunDirectory.prepare(small(begun.parent))
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_run(begun)
    assert "delete it" in str(caught.value.hint)
    file.unlink()
    with RunDirectory.prepare(small(begun.parent)):
        assert load_run(begun).config.run.name == "small"


@pytest.mark.parametrize("text", ["", "[]", "3", '{"inputs": 3}', '{"inp'])
def test_other_torn_files_are_as_none(begun: Path, text: str) -> None:
    (begun / "meta.json").write_text(text)
    assert RunDirectory.recorded_inputs(begun) == {}
    with RunDirectory.prepare(small(begun.parent)):
        (begun / "run.lock").write_text("")
        assert RunDirectory.owner(begun) is None


def test_a_home_in_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(CONFIGS / "quickstart.yaml", ["run.dir=~/runs", "run.name=small"]).config
    with RunDirectory.prepare(config) as run:
        assert run.path == tmp_path / "runs" / "small"


def test_a_full_disk_is_said_with_the_way_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        with RunDirectory.prepare(small(disk)) as run:
            (run.path / "store").mkdir()
        before = (run.path / "config.yaml").read_text()
        with open(disk / "others", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1)):
                pass
        with pytest.raises(LaunchError, match=r"run\.dir: cannot write .*small: No space left on device") as caught:
            RunDirectory.prepare(small(disk))
        assert "free space" in str(caught.value.hint)
        assert (run.path / "config.yaml").read_text() == before
        (disk / "others").unlink()
        with RunDirectory.prepare(small(disk)):
            pass
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
