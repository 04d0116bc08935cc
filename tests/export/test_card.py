"""The model card: what it tells, and what it must not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from pmdflow.config.recorded import recorded_meta
from pmdflow.export.card import CURVE_ROWS, hub_model, model_card
from tests.support.fixture_run import FixtureRun


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = FixtureRun(tmp_path / "sums", iterations=60)
    made.iterate(45, archive=False)
    (made.run_dir / "meta.json").write_text(
        '{"pmdflow": "0.1.0", "packages": {"ray": "2"}, "hardware": {"torch": "3"}}'
    )
    return made.run_dir


def card(run: Path, *, iteration: int = 45, adapter: bool = False) -> str:
    return model_card(run, iteration=iteration, version=46, dtype="bfloat16", adapter=adapter)


def test_it_tells_run_data_versions_and_curve(run: Path) -> None:
    text = card(run)
    metadata = ModelCard(text).data.to_dict()
    assert metadata["library_name"] == "transformers" and "pmdflow" in metadata["tags"]
    assert "# sums, iteration 45" in text and "policy version 46" in text and "bfloat16" in text
    assert "`reasoning_gym/chain_sum`" in text and "| torch | 3 |" in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    curve = [row for row in rows if row[0].strip().isdigit()]
    numbers = [int(row[0]) for row in curve]
    assert numbers[0] == 0 and numbers[-1] == 45 and len(numbers) == CURVE_ROWS and numbers == sorted(set(numbers))
    assert float(curve[0][3]) == pytest.approx(0.4, abs=0.01)  # the held-out reward before training
    assert all(0 <= float(row[1]) <= 1 and float(row[2]) > 0 for row in curve[1:])


def test_it_ends_at_the_exported_iteration(run: Path) -> None:
    assert "| 12 |" in card(run, iteration=12) and "| 13 |" not in card(run, iteration=12)


def test_what_an_environment_variable_holds_and_where_files_lie_is_nowhere(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "hush-hush")
    monkeypatch.setenv("DATA", "/home/somebody")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"task": "${DATA}/private/sums.jsonl", "args": {"key": "${JUDGE_KEY}", "token": "in-the-clear"}}
    settings["model"]["path"] = "/home/somebody/models/Qwen"
    # What a run records of a module: the folder that it was found in, and what was written.
    settings["reward"] = {"functions": [{"function": "/home/somebody/private:own:score", "weight": 2.0}]}
    settings["data"]["reward"] = [{"function": "/home/somebody/private:own:of_source"}]
    settings["learner"] = {**settings.get("learner", {}), "algorithm": "/home/somebody/private:mine:Mine"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    text = card(run)
    assert "`sums.jsonl`" in text and "`Qwen`" in text and "`mine:Mine`" in text
    assert "`own:score` x 2, `own:of_source` x 1" in text
    assert not any(secret in text for secret in ("hush-hush", "somebody", "in-the-clear", "private", os.getcwd()))


def test_a_model_of_the_hub_is_named_as_the_base(run: Path) -> None:
    meta = json.loads((run / "meta.json").read_text())
    meta["inputs"] = {"model": {"id": "org/tiny", "commit": "0123abc"}}
    (run / "meta.json").write_text(json.dumps(meta))
    text = card(run, adapter=True)
    metadata = ModelCard(text).data.to_dict()
    assert metadata["base_model"] == "org/tiny" and metadata["library_name"] == "peft"
    assert "`org/tiny@0123abc`" in text


def test_a_mixture_is_told_by_its_sources(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["task"] = [{"task": "reasoning_gym/chain_sum", "args": {"key": "hidden"}}, {"task": "/a/b.jsonl"}]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "| `reasoning_gym/chain_sum, b.jsonl` |" in card(run) and "hidden" not in card(run)


def test_a_torn_meta_json_leaves_out_what_it_said(tmp_path: Path) -> None:
    assert recorded_meta(tmp_path) == {}
    for text in ('{"hardware": {"proc', "[]"):
        (tmp_path / "meta.json").write_text(text)
        assert recorded_meta(tmp_path) == {} and hub_model(tmp_path) is None
