"""Every causal family of the installed transformers trains on what a plain forward pass says, or is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCAN = [sys.executable, str(ROOT / "bench" / "families.py")]


@pytest.mark.timeout(600)
def test_the_scan_tells_what_trains_from_what_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "families.md"
    done = subprocess.run([*SCAN, "llama", "mamba", "--out", str(out)], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert "1 trains, 1 refused" in out.read_text()
    assert "a mamba has a recurrent state: sequences cannot share a row" in out.read_text()


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_no_family_trains_wrongly_unseen() -> None:
    done = subprocess.run(SCAN, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
