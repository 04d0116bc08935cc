"""Whose process a run directory names: `down` signals none that is not the run's."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmdflow.errors import LaunchError
from pmdflow.run.owner import Owner
from pmdflow.run.status import down, status


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (" node7 pid:[4026531836]", "node7"),
        (f" {Owner.me().place}0", r"0, which is not here"),
        ("", "an unknown machine"),
    ],
)
def test_down_leaves_alone_who_has_the_same_number_here(
    tmp_path: Path, bystander: subprocess.Popen[bytes], place: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    with open(tmp_path / "run.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{bystander.pid}{place}")
        lock.flush()
        with pytest.raises(LaunchError, match=rf"is run by process {bystander.pid} of .*{said}") as caught:
            down(tmp_path)
        assert f"kill -INT {bystander.pid}" in str(caught.value.hint)
        with pytest.raises(subprocess.TimeoutExpired):
            bystander.wait(timeout=0.3)
        if not place:
            status(tmp_path)
            assert f"running, process {bystander.pid} of an unknown machine" in capsys.readouterr().out


def test_what_a_lock_says_comes_back() -> None:
    me = Owner.me()
    assert Owner.of(f"{me}\n") == me
    assert me.is_here
    assert Owner.of("") is None
