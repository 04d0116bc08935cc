"""Learning-rate schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.schedule import FLOOR, learning_rate


def rates(steps: int, *, since_reset: int = 99, **settings: object) -> list[float]:
    learner = LearnerConfig.model_validate({"lr": 2.0, **settings})
    return [learning_rate(learner, steps_taken=step, steps_since_reset=since_reset) for step in range(steps)]


def test_the_warm_up_rises_to_the_rate_and_a_constant_one_stays() -> None:
    assert rates(6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(3) == [2.0, 2.0, 2.0]


def test_linear_and_cosine_fall_from_the_end_of_the_warm_up_to_a_tenth_and_stay_there() -> None:
    linear = rates(40, warmup_steps=4, lr_schedule="linear", lr_decay_steps=24)
    cosine = rates(40, warmup_steps=4, lr_schedule="cosine", lr_decay_steps=24)
    for values in (linear, cosine):
        assert values[:4] == [0.5, 1.0, 1.5, 2.0]
        assert values[4] == 2.0
        assert all(later < earlier for earlier, later in pairwise(values[4:25]))
        assert values[24:] == pytest.approx([2.0 * FLOOR] * 16)
    assert linear[14] == cosine[14] == pytest.approx(2.0 * (1 + FLOOR) / 2)
    assert cosine[9] > linear[9] and cosine[19] < linear[19]


def test_a_reset_warms_up_within_the_schedule() -> None:
    settings = {"lr_schedule": "linear", "lr_decay_steps": 10, "reset_optimizer": True, "reset_warmup_steps": 4}
    whole, half = rates(10, **settings), rates(10, since_reset=1, **settings)
    assert half == pytest.approx([rate / 2 for rate in whole])
