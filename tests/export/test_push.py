"""An export on a Hub: the real client against a server on loopback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path

import pytest

from tests.support.hub_uploads import TOKEN, HubUploads
from tests.support.paths import ROOT
from tests.support.trained_run import TrainedRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with TrainedRun(tmp_path_factory.mktemp("run")) as trained:
        trained.train()
    return trained.path


def export(run: Path, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pmdflow.cli", "export", str(run), str(out), *arguments],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


def test_the_whole_folder_is_one_commit_of_a_private_repository(run: Path, tmp_path: Path) -> None:
    with HubUploads(tmp_path / "home") as hub:
        done = export(run, tmp_path / "out", "--push", "me/sums", **hub.environment)
        assert done.returncode == 0, done.stderr
        written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert hub.repositories == {"me/sums": written}
        assert hub.private == {"me/sums"}
        assert hub.address in done.stdout
        assert sum("/commit/" in line for line in hub.asked) == 1
        assert TOKEN not in done.stdout + done.stderr
        assert all(TOKEN.encode() not in content for content in written.values())


def test_a_failed_upload_names_the_command_that_goes_on(run: Path, tmp_path: Path) -> None:
    with HubUploads(tmp_path / "home") as hub:
        hub.repositories["me/sums"] = {"adapter_config.json": b"old"}
        hub.broken = HTTPStatus.FORBIDDEN
        done = export(run, tmp_path / "out", "--push", "me/sums", **hub.environment)
        assert done.returncode == 1
        assert done.stderr.startswith("error: --push me/sums: ") and "\n\nhint: check HF_ENDPOINT" in done.stderr
        assert "Traceback" not in done.stderr
        hub.broken = None
        program, *arguments = shlex.split(done.stderr.split("`")[1])
        subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            env={**os.environ, **hub.environment}, check=True, capture_output=True, timeout=100,
        )  # fmt: skip
        written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert "model.safetensors" in written and hub.repositories == {"me/sums": written}


def test_nothing_of_an_earlier_model_is_left_to_be_loaded_and_what_is_no_model_stays(run: Path, tmp_path: Path) -> None:
    kept = dict.fromkeys(("NOTES.md", "gguf/model.safetensors", "onnx/config.json", ".gitattributes"), b"mine")
    earlier = ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "chat_template.jinja")
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
    with HubUploads(tmp_path / "home") as hub:
        hub.repositories["me/sums"] = {**kept, **dict.fromkeys((*earlier, *shards, "model.safetensors"), b"old")}
        done = export(run, tmp_path / "out", "--push", "me/sums", **hub.environment)
        assert done.returncode == 0, done.stderr
        written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert hub.repositories["me/sums"] == {**kept, **written}
        assert sum("/commit/" in line for line in hub.asked) == 1


@pytest.mark.parametrize(
    ("repository", "environment", "message"),
    [
        ("me/sums", {"HF_TOKEN": "hf_wrong"}, "Invalid user token"),
        ("me/sums", {"HF_TOKEN": ""}, "set HF_TOKEN"),
        ("me/sums", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("me/sums", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "check HF_ENDPOINT"),
        ("me//sums", {}, "ORGANIZATION/NAME"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_anything_is_read(
    repository: str, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    with HubUploads(tmp_path / "home") as hub:
        done = export(tmp_path, tmp_path / "out", "--push", repository, **{**hub.environment, **environment})
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 3  # what, a blank line, a hint
