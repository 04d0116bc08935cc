"""One process at a time has the memory of a device, and whoever is killed has it no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pmdflow.errors import WaitTimeout
from pmdflow.weights.device_turn import DeviceTurn

HOLD = """
import sys, time
from pmdflow.weights.device_turn import DeviceTurn
turn = DeviceTurn(sys.argv[1], "GPU 0")
turn.take(timeout_s=30.0)
print("held", flush=True)
time.sleep(600)
"""


def test_a_device_is_had_in_turn_and_a_killed_process_gives_it_back(tmp_path: Path) -> None:
    turn, others = DeviceTurn(str(tmp_path), "GPU 0"), DeviceTurn(str(tmp_path), "GPU 1")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        others.take(timeout_s=0.0)
        with pytest.raises(
            WaitTimeout, match=r"another process had the memory of GPU 0 for 0.1 s \(cluster.colocate\)"
        ):
            turn.take(timeout_s=0.1)
    finally:
        holder.kill()
        holder.wait()
    turn.take(timeout_s=10.0)
    turn.take(timeout_s=0.0)
    with pytest.raises(WaitTimeout):
        DeviceTurn(str(tmp_path), "GPU 0").take(timeout_s=0.0)
    turn.give()
    DeviceTurn(str(tmp_path), "GPU 0").take(timeout_s=0.0)
