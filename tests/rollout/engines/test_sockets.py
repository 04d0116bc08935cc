"""The folder where vLLM's processes meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pmdflow.rollout.engines.vllm.sockets import Sockets

PEER = """
import os, signal
from pmdflow.rollout.engines.vllm.sockets import Sockets
(Sockets().folder / "socket").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_it_not_even_by_a_process_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "elsewhere")
    killed = subprocess.run([sys.executable, "-c", PEER], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("*/vllm-*/socket")
    sockets = Sockets()
    assert not left.exists()
    assert os.environ["VLLM_RPC_BASE_PATH"] == str(sockets.folder)
    Sockets()  # another engine of this process
    (sockets.folder / "socket").touch()
    sockets.close()
    assert not list(tmp_path.glob("*/*"))
    Sockets()
    assert sockets.folder.exists()
