"""The methods in configs/examples: short, by the rules, and by their definitions."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pmdflow.config.load import load
from pmdflow.learner.advantage import grpo
from pmdflow.learner.conformance import check_algorithm
from pmdflow.learner.view import ClaimView
from pmdflow.reward.group import GroupView
from tests.support.learner import make_batch, make_config
from tests.support.paths import ROOT

torch.set_num_threads(1)
EXAMPLES = ROOT / "configs" / "examples"
METHODS = {"lead": "LEAD", "sas": "SAS"}


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.mark.parametrize("name", METHODS)
def test_an_example_is_short_and_keeps_the_rules(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60
    components = ["lead.efficiency.value"] if name == "lead" else ()
    assert "keeps all" in check_algorithm(f"{name}:{METHODS[name]}", components=components)
    config = load(EXAMPLES / f"{name}.yaml").config
    assert config.learner.algorithm.endswith(f"{name}:{METHODS[name]}") and Path(config.model.path).is_dir()


@pytest.mark.parametrize("name", METHODS)
def test_an_example_trains(start, model_path, name: str) -> None:
    config = make_config(model_path, algorithm=f"{EXAMPLES}:{name}:{METHODS[name]}")
    if name == "lead":
        group = [{"function": f"{EXAMPLES}:lead:efficiency", "weight": 0.0, "args": {"least": 2, "most": 16}}]
        config = config.model_copy(
            update={"reward": config.reward.model_validate({**config.reward.model_dump(), "group": group})}
        )
    learner = start(config)
    metrics = [learner.train(make_batch(seed=seed)).metrics for seed in range(3)]
    assert all(one["learner/grad_norm"] > 0 for one in metrics)
    if name == "lead":
        weights = [one["learner/credit_correctness_weight"] for one in metrics]
        assert len(set(weights)) == 3 and all(0.3 <= weight <= 1 for weight in weights)


def group(lengths: list[int], correct: list[int]) -> GroupView:
    right = np.array(correct, bool)
    return GroupView(
        iteration=1, prompt_id="p", rewards=right.astype(float), components={}, answers={}, correct=right,
        lengths=np.array(lengths), stops=np.ones(len(lengths), np.uint8),
    )  # fmt: skip


def test_lead_by_its_definition() -> None:
    lead = sys.modules.get("lead") or __import__("lead")
    target = statistics.fmean([1200, 2400])
    found = lead.efficiency(group([1200, 2400, 7000], [1, 1, 0]), (), least=1000, most=8000)["value"]
    np.testing.assert_allclose(found, [1 - 600 / target, 1 - 600 / target, -1.0])
    assert lead.efficiency(group([300, 700], [1, 1]), (), least=1000, most=8000)["value"][0] == pytest.approx(0.3)
    np.testing.assert_allclose(lead.efficiency(group([4000], [0]), (), least=1, most=8000)["value"], [0.5])

    rewards, groups = [1.0, 0, 1, 1], [0, 0, 1, 1]
    values = np.array([0.5, -0.2, 0.8, 0.1])
    view = ClaimView.of_rewards(rewards, groups, components={"lead.efficiency.value": values})
    state = {"weights": [0.5, 0.5]}
    credit = lead.credit(view, make_config("x", settings={"alpha": 1.0}).learner, state)

    def cv(parts: list[list[float]]) -> tuple[float, float]:
        everything = [x for part in parts for x in part]
        means = [statistics.fmean(part) for part in parts]
        variance = statistics.fmean([statistics.pvariance(part) for part in parts]) + statistics.pvariance(means)
        return statistics.fmean(everything), math.sqrt(variance + 1e-8) / statistics.fmean(everything)

    (m0, c0), (m1, c1) = cv([[1, 0], [1, 1]]), cv([[0.5], [0.8, 0.1]])
    d0, d1 = c0 / (c0 + c1) * (1 - m0), c1 / (c0 + c1) * (1 - m1)
    weight = 0.95 * 0.5 + 0.05 * d0 / (d0 + d1)
    assert credit.state["weights"] == pytest.approx([weight, 1 - weight])
    summed = weight * grpo(rewards, groups) + (1 - weight) * grpo(values, groups)
    np.testing.assert_allclose(credit.values, (summed - summed.mean()) / summed.std(), rtol=1e-6)
    assert state == {"weights": [0.5, 0.5]}


def test_sas_by_its_definition() -> None:
    sas = sys.modules.get("sas") or __import__("sas")
    tokens = np.array([5, 9, 6, 6, 9, 7, 9, 1, 8, 9])
    steps = sas.steps_of(tokens, [9], 1)
    assert steps.tolist() == [0, 0, 1, 1, 1, 2, 2, -1, -1, -1]
    five = np.repeat(np.arange(5), 2)
    sure = np.repeat([-3.0, -1.0, -0.5, -2.0, -0.1], 2)
    assert np.unique(five[sas.masked(five, sure, True)]).tolist() == [0, 3], "the two least sure of five"
    six, sure = np.arange(6), np.array([-3.0, -1.0, -0.05, -2.0, -0.1, -0.3])
    assert np.flatnonzero(sas.masked(six, sure, False)).tolist() == [2], "the surest of six"
    assert not sas.masked(np.full(3, -1), np.zeros(3), True).any()
