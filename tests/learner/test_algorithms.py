"""The table of algorithms: found by name or path, and what each makes of a claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pmdflow.learner.advantage import boltzmann_weights, pmd_partition
from pmdflow.learner.algorithms import ALGORITHMS, find_algorithm
from pmdflow.learner.learner import Learner
from pmdflow.learner.objective import clipped_tokens
from tests.support.learner import assert_metrics_alike, make_batch, make_config
from tests.support.whole import Whole

torch.set_num_threads(1)


def test_algorithms_are_found_by_name_and_path(model_path, tmp_path, monkeypatch):
    (tmp_path / "mine_algorithm.py").write_text(
        "from pmdflow.learner.algorithms import ALGORITHMS\nmine = ALGORITHMS['grpo']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_algorithm("mine_algorithm:mine") is ALGORITHMS["grpo"]
    with pytest.raises(ValueError, match="use one of pmd_mean"):
        Learner(config=make_config(model_path, algorithm="pmd"), rank=0)
    with pytest.raises(ValueError, match="cannot be imported"):
        find_algorithm("pmdflow.nothing:here")
    with pytest.raises(ValueError, match="make it an Algorithm"):
        find_algorithm("pmdflow.learner.algorithms:find_algorithm")


def test_an_algorithm_of_ones_own_is_named_by_import_path(start, model_path):
    batch = make_batch()
    result = start(make_config(model_path, algorithm="tests.support.algorithm:MINE")).train(batch)
    np.testing.assert_array_equal(result.advantages, batch.rewards - 0.25)
    assert result.metrics["learner/grad_norm"] > 0


def test_boltzmann_weights_and_partition_options_reach_the_loss(start, model_path):
    batch = make_batch()
    arguments = (batch.rewards, batch.groups)
    options = {"leave_one_out": False, "partition_floor": 1e-3}
    advantages = pmd_partition(*arguments, tau=0.5, leave_one_out=False, floor=1e-3)
    whole = Whole(model_path, batch)
    loss = whole.first_step(tau=0.5, advantages=advantages, weights=boltzmann_weights(*arguments, tau=0.5))
    config = make_config(model_path, algorithm="boltzmann_pmd", steps_per_iteration=1, **options)
    result = start(config).train(batch)
    np.testing.assert_array_equal(result.advantages, advantages)
    assert_metrics_alike(result.metrics, {"learner/loss": loss.item()})


@pytest.mark.parametrize("name", [name for name, algorithm in ALGORITHMS.items() if algorithm.clipped is not None])
def test_clipped_share_follows_the_band(start, model_path, name):
    shares = []
    for clip in (1e-6, 0.999):
        config = make_config(model_path, algorithm=name, clip_low=clip, clip_high=clip, lr=1e-2)
        shares.append(start(config).train(make_batch()).metrics["learner/clipped_share"])
    assert 1 >= shares[0] > shares[1] >= 0
    assert "learner/clipped_share" not in start(make_config(model_path)).train(make_batch()).metrics


def test_clipped_tokens_by_hand():
    lp = torch.tensor([[0.3, -0.3, 0.05, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    zero, up, down = torch.zeros(1, 4), torch.tensor([1.0]), torch.tensor([-1.0])

    def count(ratio, advantages):
        return int(clipped_tokens(lp, zero, advantages, mask, ratio=ratio, low=-0.2, high=0.2))

    assert [count("token", up), count("token", down), count("token-both-sides", up)] == [1, 1, 2]
    assert [count("prefix", up), count("prefix", down)] == [1, 0]  # sums 0.3, 0, 0.05 against 0.2 sqrt t
    assert [count("sequence", up), int(clipped_tokens(lp, zero, up, mask, ratio="sequence", low=-1, high=0.01))] == [
        0,
        3,
    ]
