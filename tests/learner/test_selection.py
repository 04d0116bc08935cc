"""What a claim is trained on: filters, vetoes, importance weights, segments of several versions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pmdflow.learner.advantage import pmd_mean
from pmdflow.types import Mask
from tests.support.learner import assert_losses_alike, assert_metrics_alike, losses, make_batch, make_config
from tests.support.whole import Whole

torch.set_num_threads(1)


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
    assert_losses_alike(losses([result]), losses([plain]))
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
        values = np.array(list(weights.values()))
        expected = {
            "learner/loss": loss.item(),
            "learner/grad_norm": whole.grad_norm(loss),
            "learner/importance_ess_share": values.sum() ** 2 / (values**2).sum() / len(values),
            "learner/importance_mean": values.mean(),
        }
        assert_metrics_alike(metrics, expected, size=1.5 * 14**0.5)  # a factor of at most 1.5, of up to 14 log-probs
        assert metrics["learner/importance_capped_share"] == pytest.approx(np.mean(np.array(units) >= 1.5))


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
    expected = {
        "learner/loss": loss.item(),
        "learner/grad_norm": whole.grad_norm(loss),
        "learner/u_mean": np.mean(all_u),
    }
    assert_metrics_alike(metrics, expected, size=1 + tau * np.abs(all_u).max())  # |A - tau u|
