"""The numbers of one claim against plain loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pmdflow.metrics.claim import claim_metrics
from pmdflow.types import ClaimPlan, Mask, Stop, TrainBatch
from tests.support.fixture_run import MAX_STALENESS, make_batch


def test_claim_metrics_agree_with_a_plain_loop() -> None:
    batch = make_batch(9, groups=16, size=8)
    values = claim_metrics(batch)
    lengths, multi, masked, ages = [], 0, 0, dict[str, int]()
    for i in range(len(batch.rewards)):
        own = slice(int(batch.cu_seqlens[i]) + int(batch.prompt_lengths[i]), int(batch.cu_seqlens[i + 1]))
        lengths.append(own.stop - own.start)
        multi += len(set(batch.versions[own].tolist())) > 1
        for flag, version in zip(batch.mask[own], batch.versions[own], strict=True):
            if flag & Mask.TRAINED:
                ages[str(batch.version - version)] = ages.get(str(batch.version - version), 0) + 1
            else:
                masked += 1
    assert values["trajectory/length_mean"] == pytest.approx(np.mean(lengths))
    assert values["trajectory/length_p90"] == pytest.approx(np.percentile(lengths, 90))
    assert values["trajectory/multi_version_share"] == multi / len(lengths) > 0
    assert values["staleness/tokens"] == dict(sorted(ages.items()))
    assert values["staleness/max"] <= MAX_STALENESS
    assert values["staleness/masked_share"] == pytest.approx(masked / sum(lengths)) and masked > 0
    assert values["trajectory/stop_share"] == np.mean(batch.stops == Stop.STOP)
    assert values["reward/mean"] == batch.rewards.mean()


def test_length_by_step_follows_the_plan() -> None:
    batch = make_batch(3, groups=4, size=2)
    plan = ClaimPlan(steps=np.array([2, 0, 2, 0], np.int32), num_steps=3, rule="by_hand", seed=None)
    lengths = (np.diff(batch.cu_seqlens) - batch.prompt_lengths).reshape(4, 2)
    by_step = claim_metrics(dataclasses.replace(batch, plan=plan))["trajectory/length_by_step"]
    assert by_step == [lengths[[1, 3]].mean(), None, lengths[[0, 2]].mean()]
    assert claim_metrics(dataclasses.replace(batch, plan=None))["trajectory/length_by_step"] is None


def test_masked_share_by_decile_follows_length() -> None:
    count, prompt = 20, 2
    lengths = np.arange(1, count + 1)[::-1]
    totals = lengths + prompt
    cu_seqlens = np.concatenate(([0], np.cumsum(totals)))
    position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], totals)
    generated = position >= prompt
    longest_two = np.repeat(lengths > 18, totals)
    mask = np.where(longest_two, Mask.GENERATED | Mask.OVER_AGE, Mask.GENERATED | Mask.TRAINED)
    zeros = np.zeros(len(position))
    batch = TrainBatch(
        iteration=1, version=0, tokens=zeros.astype(np.int32), logprobs=zeros.astype(np.float32),
        versions=np.where(generated, 0, -1).astype(np.int32), temperatures=zeros.astype(np.float32) + 1,
        mask=np.where(generated, mask, 0).astype(np.uint8), cu_seqlens=cu_seqlens.astype(np.int64),
        prompt_lengths=np.full(count, prompt, np.int32), groups=np.zeros(count, np.int64),
        trajectories=np.arange(count), rewards=np.zeros(count), components={}, stops=np.ones(count, np.uint8),
        prompt_ids=("p",) * count,
    )  # fmt: skip
    assert claim_metrics(batch)["staleness/masked_share_by_decile"] == [0.0] * 9 + [1.0]
