"""The one writer of the JSON lines of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pmdflow.errors import PmdflowError
from pmdflow.metrics.recorder import Recorder
from tests.support.fixture_run import span


def test_records_are_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    with Recorder(tmp_path, clock=lambda: 5.0) as recorder:
        values = {"a": float("nan"), "b": np.array([1.0, np.inf]), "c": {2: np.int64(3)}}
        recorder.metric("iteration", {"iteration": 1, **values})
        recorder.spans([span("generate", 1.0, 2.0)])
        recorder.event("start", "hello", path=tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"time": 5.0, "kind": "iteration", "iteration": 1, "a": None, "b": [1.0, None], "c": {"2": 3}}
    assert json.loads((tmp_path / "spans.jsonl").read_text())["name"] == "generate"
    assert json.loads((tmp_path / "events.jsonl").read_text())["path"] == str(tmp_path)


@pytest.mark.parametrize("torn", ['{"time": 1, "ki', "x" * 200_000, ""])
def test_a_torn_last_line_is_cut_off_at_opening(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"time": 0, "kind": "sample"}\n' + torn)
    with Recorder(tmp_path, clock=lambda: 1.0) as recorder:
        recorder.metric("sample", {})
    assert [json.loads(line)["time"] for line in file.read_text().splitlines()] == [0, 1.0]


def test_a_full_disk_and_an_unwritable_directory_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        Recorder(tmp_path) as recorder,
        pytest.raises(PmdflowError, match=r"(?s)metrics\.jsonl: No space left.*hint: .*resumes"),
    ):
        recorder.metric("sample", {})
    with pytest.raises(PmdflowError, match=r"missing/metrics\.jsonl"):
        Recorder(tmp_path / "missing")
