"""The algorithm and the scorer of the guide, as a reader makes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.learner.learner import Learner
from pmdflow.learner.scorers.make import make_scorer
from pmdflow.learner.scorers.protocol import TokenBatch
from tests.support.guides import steps
from tests.support.learner import make_batch, make_config, write_model
from tests.support.paths import ROOT

GUIDE = ROOT / "pmdflow" / "learner" / "ALGORITHMS.md"


def test_an_own_algorithm_of_twenty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = next(step.text for step in steps(GUIDE) if step.language == "python")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 20
    (tmp_path / "my_algorithm.py").write_text(snippet)
    monkeypatch.chdir(tmp_path)
    checked = CliRunner().invoke(app, ["check-algorithm", "my_algorithm:mine"], catch_exceptions=False)
    assert "my_algorithm:mine keeps all" in checked.output
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(
        write_model(tmp_path / "model"), algorithm="my_algorithm:mine", settings={"cut": 0.3}, steps_per_iteration=1
    )
    learner = Learner(config=config, rank=0)
    learner.setup(learner.address())
    try:
        metrics = learner.train(make_batch()).metrics
    finally:
        learner.close()
        sys.modules.pop("my_algorithm")
    assert 0.7 <= metrics["learner/credit_share"] <= 1 and metrics["learner/grad_norm"] > 0


def test_an_own_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = [step.text for step in steps(GUIDE) if step.language == "python"][1]
    (tmp_path / "my_scorer.py").write_text(snippet)
    monkeypatch.syspath_prepend(tmp_path)
    scorers = {"first": {"use": "my_scorer:First", "settings": {"value": 2.0}}}
    scorer = make_scorer(make_config("nowhere", scorers=scorers), "first", device="cpu")
    sys.modules.pop("my_scorer")
    batch = TokenBatch.of([[1], [2], [3]], [[4, 5], [], [6]])
    assert scorer.score(batch)["first"].tolist() == [2.0, 0.0, 2.0]
