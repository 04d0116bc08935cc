"""Options of the learner on the tiny random model, each against an independent computation of whole sequences."""

# ruff: noqa: F811

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pmdflow.config.schema import RepetitionConfig, RewardConfig
from pmdflow.data.sampling import SamplingControl, sampling_temperature
from pmdflow.learner.advantage import boltzmann_weights, pmd_mean, pmd_partition
from pmdflow.learner.algorithms import ALGORITHMS, Algorithm
from pmdflow.learner.flops import Speed
from pmdflow.learner.objective import clipped_tokens, pmd_loss
from pmdflow.learner.supervised import SupervisedData
from pmdflow.reward.length import length_reward
from pmdflow.reward.total import total_rewards
from pmdflow.rollout.engine import Output
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.repetition import RepetitionDetector
from pmdflow.store import TrajectoryStore
from pmdflow.types import Mask, Prompt, Quota, Stop
from tests.learner.test_learner import make_batch, make_config, model_path, start  # noqa: F401
from tests.support.paths import ROOT, TINY

torch.set_num_threads(1)


class Whole:
    """Every sequence of a batch by itself, in float64: log-probs, entropies and masks of its generated tokens."""

    def __init__(self, path, batch):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        self.batch = batch
        self.logprobs, self.entropies, self.trained, self.behavior, self.versions = [], [], [], [], []
        for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            lp, entropy = self.scores(batch.tokens[first:last], batch.temperatures[first:last])
            chosen = torch.from_numpy((batch.mask[first:last] & Mask.GENERATED) != 0)
            self.logprobs.append(lp[chosen[1:]])
            self.entropies.append(entropy[chosen[1:]])
            self.trained.append(torch.from_numpy((batch.mask[first:last] & Mask.TRAINED) != 0)[chosen])
            self.behavior.append(torch.from_numpy(batch.logprobs[first:last].astype(np.float64))[chosen])
            self.versions.append(torch.from_numpy(batch.versions[first:last])[chosen])

    def scores(self, tokens, temperatures):
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = self.model(ids[None]).logits[0, :-1] / torch.from_numpy(temperatures[1:, None].astype(np.float64))
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(1, ids[1:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)

    def active(self):
        return [index for index, trained in enumerate(self.trained) if trained.any()]

    def first_step(self, *, tau, advantages, weights=None):
        """The PMD loss of one step over the whole claim, log pi_i = log pi_theta: u is 0, but has a gradient."""
        terms = []
        for index in self.active():
            lp, trained = self.logprobs[index], self.trained[index]
            u = (lp - lp.detach())[trained].sum()
            weight = 1.0 if weights is None else weights[index]
            terms.append(weight * tau / 2 * (advantages[index] / tau - u) ** 2 / len(lp))
        return torch.stack(terms).mean()

    def grad_norm(self, loss):
        gradients = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True, allow_unused=True)
        return float(torch.sqrt(sum((g**2).sum() for g in gradients if g is not None)))


def empty(batch, trajectories):
    """The batch with nothing trained in some trajectories."""
    mask = batch.mask.copy()
    for index in trajectories:
        mask[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]] &= ~np.uint8(Mask.TRAINED)
    return replace(batch, mask=mask)


def trained_tokens(batch):
    return int(((batch.mask & Mask.TRAINED) != 0).sum())


def test_group_filter_empties_masks_and_is_counted(start, model_path):
    batch = make_batch(seed=3)
    batch = replace(batch, rewards=np.array([1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1], np.float64))
    result = start(make_config(model_path, keep_groups_above=0.0, keep_groups_below=1.0)).train(batch)
    left = empty(batch, [0, 1, 2, 3, 4, 5, 12, 13, 14])
    plain = start(make_config(model_path)).train(left)
    assert result.metrics["learner/step_losses"] == plain.metrics["learner/step_losses"]
    assert result.left_out == {"filter": [0, 1, 2, 3, 4, 5, 12, 13, 14], "veto": []}
    assert plain.left_out == {"filter": [], "veto": []}
    assert result.metrics["learner/trained_tokens"] == trained_tokens(left)
    assert result.metrics["learner/filter_share"] == pytest.approx(1 - trained_tokens(left) / trained_tokens(batch))


def test_filter_that_leaves_nothing_skips_every_step(start, model_path):
    result = start(make_config(model_path, keep_groups_above=5.0)).train(make_batch())
    assert result.metrics["learner/skipped_steps"] == 2
    assert result.metrics["learner/filter_share"] == 1.0


@pytest.mark.parametrize("limit", [20, 4096])
def test_veto_drops_sequences_and_their_denominators(start, model_path, limit):
    batch = make_batch()
    whole = Whole(model_path, batch)
    behavior = batch.logprobs.copy()
    for index in (2, 7):
        part = slice(batch.cu_seqlens[index], batch.cu_seqlens[index + 1])
        flags = batch.mask[part]
        last = np.flatnonzero(flags & Mask.TRAINED)[-1]
        behavior[part.start + last] = whole.logprobs[index][-1].item() + 10.0  # ratio e^-10 < 1e-4
    mismatched = replace(batch, logprobs=behavior)
    result = start(make_config(model_path, veto=True, tokens_per_microbatch=limit)).train(mismatched)
    left = empty(batch, [2, 7])
    plain = start(make_config(model_path, tokens_per_microbatch=limit)).train(left)
    np.testing.assert_allclose(result.metrics["learner/step_losses"], plain.metrics["learner/step_losses"], rtol=1e-5)
    assert result.metrics["learner/veto_share"] == pytest.approx(1 - trained_tokens(left) / trained_tokens(batch))
    assert result.left_out == {"filter": [], "veto": [2, 7]}
    assert result.metrics["learner/trained_tokens"] == trained_tokens(left)


def test_what_a_learner_left_out_can_be_trained_at_a_replay(start, model_path):
    """An archived mask says why a token was not trained; other settings may train it."""
    batch = make_batch(seed=3)
    flagged = replace(batch, mask=batch.mask.copy())
    for index, flag in ((0, Mask.FILTER), (7, Mask.VETO)):
        part = flagged.mask[flagged.cu_seqlens[index] : flagged.cu_seqlens[index + 1]]
        part[part & Mask.TRAINED != 0] = Mask.GENERATED | flag
    expected = start(make_config(model_path)).train(batch)
    found = start(make_config(model_path)).train(flagged)
    assert found.metrics == expected.metrics
    assert found.left_out == expected.left_out


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalize", [False, True])
def test_importance_weights_enter_before_the_batch_mean(start, model_path, level, normalize):
    batch = make_batch()
    whole = Whole(model_path, batch)
    noise = np.random.default_rng(0).normal(0, 0.4, len(batch.tokens)).astype(np.float32)
    behavior = np.zeros_like(batch.logprobs)
    generated = (batch.mask & Mask.GENERATED) != 0
    behavior[generated] = torch.cat(whole.logprobs).detach().numpy()
    batch = replace(batch, logprobs=np.where(generated, behavior + noise, 0).astype(np.float32))
    whole = Whole(model_path, batch)
    weights, units = {}, []
    for index in whole.active():
        ratio = (whole.logprobs[index] - whole.behavior[index]).detach()[whole.trained[index]]
        per_token = ratio.exp().clamp(max=1.5)
        weights[index] = float(per_token.mean()) if level == "token" else float(ratio.sum().exp().clamp(max=1.5))
        units += per_token.tolist() if level == "token" else [weights[index]]
    scale = 1 / np.mean(units) if normalize else 1.0
    scaled = {index: weight * scale for index, weight in weights.items()}
    loss = whole.first_step(tau=0.5, advantages=pmd_mean(batch.rewards, batch.groups), weights=scaled)
    for limit in (20, 4096):
        config = make_config(
            model_path,
            importance_weights=level,
            importance_cap=1.5,
            importance_normalize=normalize,
            steps_per_iteration=1,
            tokens_per_microbatch=limit,
        )
        metrics = start(config).train(batch).metrics
        assert metrics["learner/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["learner/grad_norm"] == pytest.approx(whole.grad_norm(loss), rel=1e-4)
        values = np.array(list(weights.values()))
        ess = values.sum() ** 2 / (values**2).sum() / len(values)
        assert metrics["learner/importance_ess_share"] == pytest.approx(ess, rel=1e-4)
        assert metrics["learner/importance_mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert metrics["learner/importance_capped_share"] == pytest.approx(np.mean(np.array(units) >= 1.5))


def test_entropy_bonus_and_supervised_loss(start, model_path):
    batch = make_batch()
    whole = Whole(model_path, batch)
    rows = [
        (np.array([3, 4], np.int32), np.array([5, 6, 7], np.int32)),
        (np.array([9], np.int32), np.array([8], np.int32)),
    ]
    pmd = whole.first_step(tau=0.5, advantages=pmd_mean(batch.rewards, batch.groups))
    entropy = torch.cat([whole.entropies[index][whole.trained[index]] for index in whole.active()]).mean()
    completions = []
    for prompt, completion in rows:
        tokens = np.concatenate([prompt, completion])
        completions.append(whole.scores(tokens, np.ones(len(tokens), np.float32))[0][-len(completion) :].mean())
    # Three sequences of two rows: the first comes again.
    supervised = -(2 * completions[0] + completions[1]) / 3
    config = make_config(model_path, steps_per_iteration=1, entropy_weight=0.7, ptx_weight=0.3, ptx_sequences=3)
    learner = start(config)
    learner._ptx = SupervisedData(rows=rows, sequences=3)
    metrics = learner.train(batch).metrics
    assert metrics["learner/loss"] == pytest.approx((pmd - 0.7 * entropy).item(), rel=1e-5)
    assert metrics["learner/ptx_loss"] == pytest.approx(supervised.item(), rel=1e-5)
    expected = whole.grad_norm(pmd - 0.7 * entropy + 0.3 * supervised)
    assert metrics["learner/grad_norm"] == pytest.approx(expected, rel=1e-4)
    every = torch.cat([whole.entropies[index] for index in whole.active()]).mean()
    assert metrics["learner/entropy"] == pytest.approx(every.item(), rel=1e-5)
    behavior = start(make_config(model_path, steps_per_iteration=1, anchor="behavior"))
    assert behavior.train(batch).metrics["learner/entropy"] == pytest.approx(every.item(), rel=1e-5)


def test_supervised_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "1 + 2 = ?", "completion": "3"}\n\n{"prompt": "2 + 2 = ?", "completion": "4"}\n')
    data = SupervisedData.of(make_config(str(TINY), ptx_data=str(path), ptx_sequences=3))
    first, second = data.batch(0), data.batch(1)
    np.testing.assert_array_equal(first.tokens[: first.cu_seqlens[1]], first.tokens[first.cu_seqlens[2] :])
    np.testing.assert_array_equal(second.tokens[: second.cu_seqlens[1]], first.tokens[slice(*first.cu_seqlens[1:3])])
    for batch in (first, second):
        for start_, end, prompt in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.prompt_lengths, strict=False):
            flags = (batch.mask[start_:end] & Mask.TRAINED) != 0
            assert not flags[:prompt].any()
            assert flags[prompt:].all()
            assert end - start_ - prompt == 2, "the digit and the end of sequence"
    for text, match in (
        ('{"prompt": "x"}', ":1: needs"),
        ("", "holds no line"),
        ('{"prompt": "", "completion": ""}', ":1:"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            SupervisedData.of(make_config(str(TINY), ptx_data=str(path)))
    with pytest.raises(ValueError, match="cannot read"):
        SupervisedData.of(make_config(str(TINY), ptx_data=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize("segment_loss", ["all", "current_only"])
@pytest.mark.parametrize("scope", ["generated", "trained"])
def test_segments_of_several_versions(start, model_path, segment_loss, scope):
    """Anchor at generation: u is not 0, and runs over generated or over trained tokens of all versions."""
    batch = make_batch()
    if segment_loss == "current_only":  # as the store masks it: older segments of each trajectory
        mask = batch.mask.copy()
        for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            older = batch.versions[first:last] < batch.versions[last - 1]
            generated = (mask[first:last] & Mask.GENERATED) != 0
            mask[first:last][older & generated] = Mask.GENERATED | Mask.SEGMENT
        batch = replace(batch, mask=mask)
    whole, tau = Whole(model_path, batch), 0.5
    assert len({int(version) for versions in whole.versions for version in versions}) == 3
    advantages = pmd_mean(batch.rewards, batch.groups)
    terms, all_u = [], []
    for index in whole.active():
        trained = whole.trained[index]
        ratio = whole.logprobs[index] - whole.behavior[index]
        chosen = trained if scope == "trained" else torch.ones_like(trained)
        u = torch.where(trained, ratio, ratio.detach())[chosen].sum()
        all_u.append(u.item())
        terms.append(tau / 2 * (advantages[index] / tau - u) ** 2 / chosen.sum())
    loss = torch.stack(terms).mean()
    config = make_config(
        model_path, anchor="behavior", u_scope=scope, segment_loss=segment_loss, steps_per_iteration=1, tau=tau
    )
    metrics = start(config).train(batch).metrics
    assert metrics["learner/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["learner/grad_norm"] == pytest.approx(whole.grad_norm(loss), rel=1e-4)
    assert metrics["learner/u_mean"] == pytest.approx(np.mean(all_u), rel=1e-4)


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
    assert result.metrics["learner/loss"] == pytest.approx(loss.item(), rel=1e-5)


def reinforce(terms, learner):
    """A loss of one's own."""
    return pmd_loss(
        terms.logprobs, terms.logprobs.detach(), terms.advantages, terms.trained, tau=9.0, cu_seqlens=terms.cu_seqlens
    )


MINE = Algorithm(advantages=lambda rewards, groups, learner: rewards - 0.25, loss=reinforce)


def test_an_algorithm_of_ones_own_is_named_by_import_path(start, model_path):
    batch = make_batch()
    result = start(make_config(model_path, algorithm="test_learner_options:MINE")).train(batch)
    np.testing.assert_array_equal(result.advantages, batch.rewards - 0.25)
    assert result.metrics["learner/grad_norm"] > 0


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


def rewards_config(**options) -> RewardConfig:
    return RewardConfig.model_validate({"functions": [{"function": "a:b"}], **options})


def test_total_rewards():
    batch = make_batch(groups=1)
    stops = np.array([Stop.STOP, Stop.LENGTH, Stop.REPETITION], np.uint8)
    batch = replace(batch, rewards=np.array([1.0, 1.0, 0.0]), stops=stops, iteration=3)
    lengths = [
        ((batch.mask[a:b] & Mask.GENERATED) != 0).sum()
        for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    ]
    plain = total_rewards(batch, rewards_config())
    np.testing.assert_array_equal(plain.total, batch.rewards)
    options = {"cut_reward": -0.5, "repetition_penalty": 0.25, "length_weight": 0.1}
    warm = total_rewards(batch, rewards_config(**options, length_warmup_iterations=3))
    np.testing.assert_array_equal(warm.total, [1.0, -0.5, -0.25])
    assert warm.metrics() == {"reward/total_mean": pytest.approx(0.25 / 3), "reward/length_weight": 0.0}
    after = total_rewards(batch, rewards_config(**options, length_warmup_iterations=2))
    expected = after.task + 0.1 * length_reward(lengths, [True, False, False], [0, 0, 0])
    np.testing.assert_array_equal(after.total, expected)
    np.testing.assert_array_equal(after.task, warm.total)
    assert after.length_weight == 0.1


def test_temperature_schedule():
    schedule = {"initial": 1.2, "final": 0.8, "iterations": 4}
    np.testing.assert_allclose([sampling_temperature(v, **schedule) for v in (0, 1, 4, 9)], [1.2, 1.1, 0.8, 0.8])
    assert sampling_temperature(7, initial=1.2, final=None, iterations=None) == 1.2


def test_a_repeating_trajectory_is_ended_and_stored_as_such():
    loops = RepetitionConfig(ngram=2, copies=3, min_tokens=6)
    store = TrajectoryStore(None, groups_per_iteration=1, lookahead=1, max_staleness=4)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=1, tokens=100, tokens_per_segment=None))
    prompt = Prompt(id="p", text="?", tokens=np.array([5], np.int32))
    store.admit("a", prompt, cursor=0, group_size=2, max_tokens=50)
    control = SamplingControl(temperature=1.0, max_tokens=50)
    segments = []
    for lease, tokens in zip(store.lease("rollout-0", 0, 2, 0.0), ([7, 8] * 4, [7, 8, 7, 9]), strict=True):
        held = HeldTrajectory(lease=lease, control=control, limit=9, context=[], repetition=RepetitionDetector(loops))
        held.take(Output(id=lease.trajectory, tokens=tokens, logprobs=[-1.0] * len(tokens), stop=None))
        assert held.end_repetition() == (len(tokens) == 8)
        segments.append(held.segment(version=0, next_version=0))
    store.append(segments)
    assert [segment.stop for segment in segments] == ["repetition", None]
    assert [len(segment.tokens) for segment in segments] == [6, 4]
    assert [item.stop for item in store.unscored(9, 1.0, 0.0)] == [Stop.REPETITION]


def test_operations_of_a_pass():
    speed = Speed(per_token=2e6, per_square=4.0, passes=4, peak=1e9)
    assert speed.operations([10, 20]) == 4 * (2e6 * 30 + 4.0 * 500)


def test_speed_is_apart_from_the_metrics_that_repeat(start, model_path):
    result = start(make_config(model_path)).train(make_batch())
    assert result.speed["learner/tokens_per_s"] > 0
    assert result.speed["learner/mfu"] is None
    json.dumps({**result.metrics, **result.speed})


def test_every_metric_of_the_learner_is_defined_in_the_table(start, model_path):
    options = {"importance_weights": "token", "algorithm": "grpo", "entropy_weight": 0.1}
    learner = start(make_config(model_path, **options))
    learner._ptx = SupervisedData(rows=[(np.array([3], np.int32), np.array([5], np.int32))], sequences=1)
    result = learner.train(make_batch())
    text = (ROOT / "pmdflow" / "metrics" / "METRICS.md").read_text()
    keys = result.metrics.keys() | result.speed.keys()
    assert {key for key in keys if f"`{key}`" not in text} == set()
    defined = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `learner/")}
    assert defined == {key for key in keys if key.startswith("learner/")}
