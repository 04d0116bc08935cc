"""Several ranks and replicas against one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pmdflow.learner.batch import plan_iteration
from pmdflow.types import Mask
from tests.support.checkpoint_files import written
from tests.support.learner import (
    assert_losses_alike,
    assert_metrics_alike,
    losses,
    make_config,
    step_losses,
    two_claims,
)
from tests.support.numeric import assert_trained_alike
from tests.support.ranks import Ranks


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Their processes, which all tests share."""
    ranks = Ranks(4)
    yield ranks
    ranks.kill()


def test_two_ranks_equal_one_and_resume_at_another_count(start, pool, model_path, tmp_path):
    first, second = two_claims()
    settings = {"steps_per_iteration": 4, "veto": True, "importance_weights": "token", "importance_normalize": True}
    one = start(make_config(model_path, **settings))
    expected = [one.train(first).metrics, one.train(second).metrics]
    plans = plan_iteration(second, counts=second.count(Mask.TRAINED), steps=4, ranks=2, tokens_per_microbatch=64)
    assert len(plans[0].ranks[0][0]) == 1
    assert plans[0].ranks[1] == ((),), "one rank only keeps pace"

    config, saved = make_config(model_path, ranks=2, **settings), tmp_path / "saved"
    ranks = pool.train(config, [first, second], save=saved, save_after=1)
    assert ranks[0].metrics == ranks[1].metrics, "every rank reports the same numbers"
    assert ranks[0].left_out == ranks[1].left_out == [{"filter": [], "veto": [2, 7]}, {"filter": [], "veto": []}]
    assert ranks[1].weights is None
    for metrics, single in zip(ranks[0].metrics, expected, strict=True):
        assert metrics.keys() == single.keys()
        assert_metrics_alike(metrics, single)
    assert ranks[0].metrics[1]["learner/skipped_steps"] == 2
    assert ranks[0].weights is not None
    assert_trained_alike(one.weights(), ranks[0].weights, lr=config.learner.lr, steps=6)

    resumed = start(make_config(model_path, **settings))
    resumed.load(str(saved))
    assert_losses_alike(losses([resumed.train(second)]), step_losses(ranks[0].metrics[1:]))


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_ranks_and_replicas_give_the_same_loss_curve(start, pool, model_path, ranks, replicas):
    claims, settings = two_claims(), {"steps_per_iteration": 2}
    one = start(make_config(model_path, **settings))
    expected = losses(one.train(claim) for claim in claims)
    found = pool.train(make_config(model_path, ranks=ranks, replicas=replicas, **settings), claims)
    assert_losses_alike(step_losses(found[0].metrics), expected)


def test_one_rank_resumed_by_two_and_again_by_one(start, pool, model_path, tmp_path):
    claims, one = two_claims(), make_config(model_path)
    learner = start(one)
    expected = losses(learner.train(claim) for claim in claims * 3)
    learner.load_initial()
    found = losses(learner.train(claim) for claim in claims)
    first, second = tmp_path / "first", tmp_path / "second"
    learner.save(str(first))
    learner.await_saved()
    ranks = pool.train(make_config(model_path, ranks=2), claims, load=first, save=second, save_after=2)
    found += step_losses(ranks[0].metrics)
    assert sorted((*ranks[0].files, *ranks[1].files), key=lambda file: file.path) == written(second)
    learner.load(str(second))
    found += losses(learner.train(claim) for claim in claims)
    assert_losses_alike(found, expected)


def test_replicas_must_divide_the_ranks(model_path):
    with pytest.raises(ValidationError, match=r"learner\.ranks \(4\) is not a multiple of learner\.replicas \(3\)"):
        make_config(model_path, ranks=4, replicas=3)


def test_what_the_first_rank_finds_wrong_with_a_model_every_rank_refuses(pool, model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        model.model.norm.weight[2] = torch.nan
    model.save_pretrained(tmp_path)
    refusals = pool.refusals(make_config(str(tmp_path), ranks=2))
    assert len(refusals) == 2
    assert all("the learner (packed rows, alone)" in text and "nan nats" in text for text in refusals)
