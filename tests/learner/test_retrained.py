"""Iterations that are trained again after a crash give the weights that they gave before, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.learner import make_config, same_weights
from tests.support.resumed_loop import ResumedLoop


@pytest.mark.parametrize("crashes", [(7,), (4, 9, 13)])
def test_the_learner_returns_to_the_state_that_it_had(start, model_path: str, tmp_path: Path, crashes) -> None:
    learner = start(make_config(model_path, steps_per_iteration=2))
    loop = ResumedLoop(seed=sum(crashes), lookahead=2, max_staleness=4, every=5)
    reached: dict[int, dict[str, Tensor]] = {}
    again = 0
    for number in range(17):
        if number in crashes:
            loop.crash()
            saved = tmp_path / str(loop.iteration)
            learner.load(str(saved)) if saved.exists() else learner.load_initial()
        loop.iterate(learner.train)
        weights = {name: weight.clone() for name, weight in learner.weights().items()}
        if loop.iteration in reached:
            again += 1
            assert same_weights(weights, reached[loop.iteration]), f"iteration {loop.iteration}"
        reached[loop.iteration] = weights
        if loop.iteration % 5 == 0 and not (tmp_path / str(loop.iteration)).exists():
            learner.save(str(tmp_path / str(loop.iteration)))
            learner.await_saved()
    assert again >= 2
    assert loop.store.ledger()["evicted_over_age"] == 0
    assert not all(torch.equal(reached[1][name], reached[2][name]) for name in reached[1])
