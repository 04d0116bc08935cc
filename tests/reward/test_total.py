"""From task rewards to the total that is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pmdflow.config.schema import RewardConfig
from pmdflow.reward.length import length_reward
from pmdflow.reward.total import total_rewards
from pmdflow.types import Mask, Stop
from tests.support.learner import (
    make_batch,
)


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
