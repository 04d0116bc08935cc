"""A small valid configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.config import MINIMAL


@pytest.fixture
def cluster_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid file, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text(MINIMAL)
    return Path("cluster.yaml")
