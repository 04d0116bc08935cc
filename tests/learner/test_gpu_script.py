"""The script for a GPU, dry: it runs on a tiny model without Ray and vLLM, and no item takes another one down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

ENDS = """
import os, sys, time
from pathlib import Path
import gpu

def crashes(place, note):
    note(found=1)
    os._exit(3)

def hangs(place, note):
    note(found=2)
    note.at_most("high", 2.0, 1.0)
    time.sleep(60)

def fails(place, note):
    raise ValueError("no such thing")

place, flushed = gpu.Place(cpu=True, folder=Path(".")), []
for work in (crashes, hangs, fails):
    found = gpu.run_item(gpu.Item(work=work, limit_s=1.0), place, flush=lambda found: flushed.append(dict(found)))
    print(work.__name__, found.get("found"), found["status"], found["error"], found["missed"])
print(sum("found" in found for found in flushed), "flushed")
place = gpu.Place(cpu=False, folder=Path("."))
print(gpu.run_item(gpu.Item(work=fails, limit_s=1.0, needs=("is_new",)), place, flush=print)["why"])
"""


def run(script: list[str], tmp_path: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """In a process that has neither Ray nor vLLM."""
    for name in ("ray", "vllm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "bench")])
    return subprocess.run(
        [sys.executable, *script], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True,
        text=True, check=False, timeout=more.get("timeout", 120),
    )  # fmt: skip


def test_two_items_run_dry(tmp_path: Path) -> None:
    done = run([str(ROOT / "bench" / "gpu.py"), "--cpu", "--json", "out.json", "attention", "publication"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["items"]) == ["attention", "publication"]
    assert all(item["status"] == "done" and not item["missed"] for item in found["items"].values())
    assert found["items"]["publication"]["published_bytes"] > 0


def test_an_item_that_crashes_hangs_or_fails_keeps_what_it_found(tmp_path: Path) -> None:
    done = run(["-c", ENDS], tmp_path)
    assert done.stdout.splitlines() == [
        "crashes 1 failed its process ended without a word []",
        "hangs 2 failed it was not done after 1 s ['high is 2, not at most 1']",
        "fails None failed ValueError: no such thing []",
        "4 flushed",
        *[line for line in done.stdout.splitlines() if line.endswith("has no is_new")],
    ], done.stderr


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_all_items_run_dry(tmp_path: Path) -> None:
    done = run([str(ROOT / "bench" / "gpu.py"), "--cpu", "--json", "out.json"], tmp_path, timeout=800)
    found = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 0, [item for item in found["items"].values() if item["status"] != "done"]
    assert len(found["items"]) == 10
