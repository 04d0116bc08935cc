"""An iteration of the learner on a tiny random Qwen3: what it computes, skips, repeats and publishes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pmdflow.learner.advantage import pmd_mean
from pmdflow.reward.length import length_reward
from pmdflow.types import Branches, Mask, TrainBatch
from tests.support.iteration import independent_iteration
from tests.support.learner import LOGPROB_SIZE, assert_metrics_alike, make_batch, make_config, same_weights
from tests.support.numeric import assert_close, assert_trained_alike

torch.set_num_threads(1)


def with_branches(batch: TrainBatch) -> TrainBatch:
    """The same with the first two trajectories of each group as branches of one episode."""
    parents = np.where(np.arange(len(batch.trajectories)) % 3 == 1, batch.trajectories - 1, -1)
    episodes = np.where(parents < 0, batch.trajectories, parents)
    branches = Branches(episodes=episodes, parents=parents, fork_offsets=np.zeros(len(parents), np.int32))
    return replace(batch, branches=branches, rewards=batch.rewards[episodes])


@pytest.mark.parametrize("batch", [make_batch(), with_branches(make_batch())], ids=["whole", "branches"])
def test_train_matches_an_independent_float64_computation(start, model_path, batch):
    config = make_config(model_path)
    losses, norms, u_values, tokens, state = independent_iteration(config, batch)
    learner = start(config)
    result = learner.train(batch)
    metrics = result.metrics
    expected = {
        "learner/step_losses": losses,
        "learner/grad_norm": np.mean(norms),
        "learner/u_mean": np.mean(u_values),
        "learner/u_std": np.std(u_values),
        "learner/reference_kl": -sum(u_values) / tokens,
    }
    assert_metrics_alike(metrics, expected)
    assert metrics["learner/trained_tokens"] == ((batch.mask & Mask.TRAINED) != 0).sum()
    assert metrics["learner/skipped_steps"] == 0
    if batch.branches is None:
        np.testing.assert_array_equal(result.advantages, pmd_mean(batch.rewards, batch.groups))
    assert json.loads(json.dumps(metrics))["learner/step_losses"] == metrics["learner/step_losses"]
    weights = learner.weights()
    assert set(weights) == {name for name in state if name != "lm_head.weight"}
    assert_trained_alike(weights, state, lr=config.learner.lr, steps=2)


def test_same_batches_from_the_same_weights_are_bit_equal(start, model_path):
    learner = start(make_config(model_path))
    first = [learner.train(make_batch(seed=seed)).metrics for seed in (0, 1)]
    weights = learner.weights()
    learner.load_initial()
    assert [learner.train(make_batch(seed=seed)).metrics for seed in (0, 1)] == first
    assert same_weights(learner.weights(), weights)


def test_first_step_has_exactly_no_log_ratio(start, model_path):
    learner = start(make_config(model_path, steps_per_iteration=1))
    metrics = learner.train(make_batch()).metrics
    assert metrics["learner/u_mean"] == metrics["learner/u_std"] == metrics["learner/reference_kl"] == 0.0


def test_mismatch_kl_is_zero_when_engine_and_learner_agree(start, model_path):
    batch = make_batch()
    state = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    behavior = batch.logprobs.copy()
    with torch.no_grad():
        for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            ids = torch.from_numpy(batch.tokens[first:last].astype(np.int64))
            logits = state(ids[None]).logits[0, :-1] / torch.from_numpy(batch.temperatures[first + 1 : last, None])
            behavior[first + 1 : last] = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    # Tokens of older versions are not engine mismatch: shift them.
    behavior[batch.versions < batch.version] += 1.0
    for anchor in ("reference", "behavior"):
        metrics = start(make_config(model_path, anchor=anchor)).train(replace(batch, logprobs=behavior)).metrics
        assert_metrics_alike(metrics, {"learner/mismatch_kl": 0.0})
    off = replace(batch, logprobs=behavior + np.float32(0.5))
    metrics = start(make_config(model_path)).train(off).metrics
    assert_metrics_alike(metrics, {"learner/mismatch_kl": 0.5})
    none = replace(batch, version=7)
    assert start(make_config(model_path)).train(none).metrics["learner/mismatch_kl"] is None


def test_masked_trajectories_and_untrained_tokens_have_no_influence(start, model_path):
    batch = make_batch()
    learner = start(make_config(model_path, u_scope="trained"))
    before = learner.train(batch).metrics["learner/step_losses"]
    behavior, tokens = batch.logprobs.copy(), batch.tokens.copy()
    behavior[(batch.mask & Mask.TRAINED) == 0] = -np.inf
    masked = slice(batch.cu_seqlens[4], batch.cu_seqlens[5])
    tokens[masked] = 1
    learner.load_initial()
    after = learner.train(replace(batch, logprobs=behavior, tokens=tokens)).metrics["learner/step_losses"]
    assert after == before


def test_steps_without_a_trained_token_are_skipped_and_counted(start, model_path):
    learner = start(make_config(model_path, weight_decay=0.1))
    initial = learner.weights()
    metrics = learner.train(make_batch(trained=False)).metrics
    assert metrics["learner/skipped_steps"] == 2
    assert metrics["learner/step_losses"] == [0.0, 0.0]
    assert same_weights(learner.weights(), initial)
    batch = make_batch()
    batch.mask[batch.cu_seqlens[9] :] &= ~np.uint8(Mask.TRAINED)
    metrics = learner.train(batch).metrics
    assert metrics["learner/skipped_steps"] == 1
    assert metrics["learner/step_losses"][1] == 0.0
    assert metrics["learner/loss"] == metrics["learner/step_losses"][0] != 0.0


def test_warm_up_and_optimizer_reset(start, model_path):
    learner = start(make_config(model_path, warmup_steps=8, reset_optimizer=True))
    rates = [learner.train(make_batch(seed=seed)).metrics["learner/lr"] for seed in range(5)]
    np.testing.assert_allclose(rates, np.array([2, 4, 6, 8, 8]) / 8 * 1e-3)
    steps = {int(state["step"]) for state in learner._optimizer.state.values()}
    assert steps == {2}, "moments and step count cover the last iteration only"
    learner = start(make_config(model_path))
    for seed in range(3):
        learner.train(make_batch(seed=seed))
    assert {int(state["step"]) for state in learner._optimizer.state.values()} == {6}


def test_a_reset_optimizer_warms_up_again_and_the_schedule_goes_on(start, model_path):
    settings = {"reset_optimizer": True, "reset_warmup_steps": 4, "warmup_steps": 5}
    learner = start(make_config(model_path, steps_per_iteration=3, **settings))
    rates = [learner.train(make_batch(seed=seed)).metrics["learner/lr"] for seed in range(3)]
    np.testing.assert_allclose(rates, np.array([3 / 5, 1, 1]) * 3 / 4 * 1e-3)  # of the third step of each iteration
    learner = start(make_config(model_path, steps_per_iteration=6, **settings))
    assert learner.train(make_batch()).metrics["learner/lr"] == 1e-3
    with pytest.raises(ValidationError, match="no reset to warm up from"):
        make_config(model_path, reset_warmup_steps=1)


def test_length_reward_enters_with_its_weight(start, model_path):
    batch = make_batch()
    lengths = [
        ((batch.mask[a:b] & Mask.GENERATED) != 0).sum()
        for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    ]
    total = batch.rewards + 0.5 * length_reward(lengths, batch.rewards > 0, batch.groups)
    learner = start(make_config(model_path, length_weight=0.5))
    np.testing.assert_array_equal(learner.train(batch).advantages, pmd_mean(total, batch.groups))


def test_bfloat16_keeps_float32_masters_and_publishes_bfloat16(start, model_path):
    exact = start(make_config(model_path)).train(make_batch()).metrics
    learner = start(make_config(model_path, dtype="bfloat16"))
    metrics = learner.train(make_batch()).metrics
    losses = metrics["learner/step_losses"], exact["learner/step_losses"]
    # Sums are float32; the result of each of the 14 is rounded to bfloat16.
    assert_close(*losses, roundings=14, size=LOGPROB_SIZE, dtype="bfloat16")
    assert all(parameter.dtype == torch.float32 for parameter in learner._policy.parameters())
    assert {tensor.dtype for tensor in learner.weights().values()} == {torch.bfloat16}


def test_published_weights_do_not_change_with_later_steps(start, model_path):
    learner = start(make_config(model_path))
    learner.train(make_batch())
    published = learner.weights()
    kept = copy.deepcopy(published)
    learner.train(make_batch(seed=1))
    assert same_weights(published, kept)
    names = [span["name"] for span in learner.drain().spans]
    assert names.count("step") == 4
    assert names.count("reference") == 2
    assert learner.drain().spans == []


def test_missing_model_is_named(start, tmp_path):
    with pytest.raises(ValueError, match=r"model\.path"):
        start(make_config(str(tmp_path / "nothing")))
    torch.distributed.destroy_process_group()


def test_the_distance_to_generation_is_reported_by_age_whatever_the_newest_version_has(start, model_path):
    batch = make_batch(version=3)
    plain = start(make_config(model_path)).train(batch).metrics["learner/behavior_kl_by_age"]
    shift = np.where(batch.versions == 3, 0.0, np.where(batch.versions >= 0, 0.25 * (3 - batch.versions), 0.0))
    moved = replace(batch, logprobs=(batch.logprobs + shift).astype(np.float32))
    found = start(make_config(model_path)).train(moved).metrics["learner/behavior_kl_by_age"]
    assert [value is None for value in found] == [value is None for value in plain]
    known = [
        (age, value - before) for age, (value, before) in enumerate(zip(found, plain, strict=True)) if value is not None
    ]
    assert len(known) >= 3
    for age, difference in known:
        assert difference == pytest.approx(0.25 * age, abs=1e-4)
    none = replace(batch, versions=np.where(batch.versions == 3, 2, batch.versions))
    assert start(make_config(model_path)).train(none).metrics["learner/behavior_kl_by_age"][0] is None
