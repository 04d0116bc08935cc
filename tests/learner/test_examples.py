"""The methods in configs/examples: short, by the rules, and by their definitions."""

from __future__ import annotations

import math
import statistics
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from pmdflow.config.load import load
from pmdflow.learner.advantage import grpo
from pmdflow.learner.algorithm import Terms
from pmdflow.learner.conformance import check_algorithm
from pmdflow.learner.scorers.protocol import Outcome, Setup, TokenBatch
from pmdflow.learner.view import ClaimView
from pmdflow.reward.group import GroupView
from tests.support.learner import make_batch, make_config
from tests.support.paths import ROOT

torch.set_num_threads(1)
EXAMPLES = ROOT / "configs" / "examples"
METHODS = {"lead": "LEAD", "sas": "SAS", "prime": "PRIME", "orz": "ORZ", "tgpo": "TGPO"}
SCORERS = {
    "prime": {"process": {"use": f"{EXAMPLES}:prime:ImplicitReward", "when": "claim", "settings": {"lr": 1e-2}}},
    "orz": {"critic": {"use": f"{EXAMPLES}:orz:Critic", "when": "claim", "settings": {"lr": 1e-2, "updates": 2}}},
}


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
    config = make_config(model_path, algorithm=f"{EXAMPLES}:{name}:{METHODS[name]}", scorers=SCORERS.get(name, {}))
    if name == "lead":
        group = [{"function": f"{EXAMPLES}:lead:efficiency", "weight": 0.0, "args": {"least": 2, "most": 16}}]
        config = config.model_copy(
            update={"reward": config.reward.model_validate({**config.reward.model_dump(), "group": group})}
        )
    learner = start(config)
    batches = [make_batch(seed=seed) for seed in range(3)]
    if name == "tgpo":
        ids = [np.repeat(batch.tokens[:, None], 1, axis=1) for batch in batches]
        batches = [replace(one, extra={"teacher_top_ids": own}) for one, own in zip(batches, ids, strict=True)]
    metrics = [learner.train(batch).metrics for batch in batches]
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


def example(name: str):
    return sys.modules.get(name) or __import__(name)


def test_prime_by_its_definition() -> None:
    prime = example("prime")
    lengths, process = [2, 3, 1], np.array([0.1, -0.2, 0.3, 0.05, 0.0, -0.4])
    outcomes, mean = [1.0, 0.0, 1.0], [-0.05, 0.35 / 3, -0.4]
    view = ClaimView.of_rewards(
        outcomes, [0, 0, 0], cu_seqlens=np.array([0, 2, 5, 6]), per_token={"column process": process}
    )
    found = prime.credit(view, make_config("x").learner, {}).values
    expected, at = [], 0
    for own, length in enumerate(lengths):
        others = [other for other in range(3) if other != own]
        baseline = statistics.fmean(mean[other] for other in others)
        outcome = outcomes[own] - statistics.fmean(outcomes[other] for other in others)
        steps = [process[at + token] - baseline for token in range(length)]
        expected += [sum(steps[token:]) + outcome for token in range(length)]
        at += length
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    still = replace(view, per_token={"column process": np.zeros(6)})
    np.testing.assert_allclose(
        prime.credit(still, make_config("x").learner, {}).values, np.repeat([0.5, -1.0, 0.5], lengths)
    )


def scorer(make, model_path: str, **settings):
    given = {"model": None, "student": model_path, "dtype": "float32", "device": torch.device("cpu")}
    torch.manual_seed(0)
    return make(Setup(settings=settings, tokens_per_batch=40, **given))


def judged(batch: TokenBatch, rewards: list[float]) -> Outcome:
    values = np.array(rewards)
    return Outcome(rewards=values, correct=values > 0.5, shares=np.ones(len(values)), add=lambda tensors: None)


BATCH = TokenBatch.of([[5, 6], [7], [8, 9, 10]], [[11, 12, 13], [14], [15, 16]])


def test_primes_model_learns_outcomes_before_it_scores(model_path) -> None:
    prime = scorer(example("prime").ImplicitReward, model_path, lr=1e-2, beta=0.5)
    assert not prime.score(BATCH)["process"].any(), "phi is the reference: every ratio is 0"
    first = prime.learn(BATCH, judged(BATCH, [1, 0, 1]))["cross_entropy"]
    assert first == pytest.approx(math.log(2), rel=1e-6), "sigmoid(0) whatever the outcome"
    saved, kept = deepcopy(prime.state()), prime.score(BATCH)["process"]
    other = scorer(example("prime").ImplicitReward, model_path, lr=1e-2, beta=0.5)
    other.load(saved)
    np.testing.assert_array_equal(other.score(BATCH)["process"], kept)
    sums = torch.from_numpy(np.add.reduceat(kept.astype(np.float64), [0, 3, 4]))
    expected = binary_cross_entropy_with_logits(sums, torch.tensor([1.0, 0, 1]).double())
    told = [one.learn(BATCH, judged(BATCH, [1, 0, 1]))["cross_entropy"] for one in (prime, other)]
    assert told[0] == told[1] == pytest.approx(float(expected), rel=1e-5)
    for _ in range(5):
        last = prime.learn(BATCH, judged(BATCH, [1, 0, 1]))["cross_entropy"]
    assert last < 0.5 * first
    np.testing.assert_array_equal(other.score(BATCH)["process"], scorer_after(model_path))


def scorer_after(model_path: str) -> np.ndarray:
    """Two steps from the start, without a checkpoint between."""
    prime = scorer(example("prime").ImplicitReward, model_path, lr=1e-2, beta=0.5)
    for _ in range(2):
        prime.learn(BATCH, judged(BATCH, [1, 0, 1]))
    return prime.score(BATCH)["process"]


def test_orz_by_its_definition(model_path) -> None:
    orz = example("orz")
    view = ClaimView.of_rewards(
        [1.0, 0.0], [0, 0], cu_seqlens=np.array([0, 4, 6]),
        per_token={"column value": np.array([0.3, 0.5, 0.4, 0.9, 0.25, -0.5])},
    )  # fmt: skip
    learner = make_config("x").learner
    view = replace(view, totals=orz.totals(view, learner))
    plain = np.array([0.7, 0.5, 0.6, 0.1, -0.25, 0.5])
    np.testing.assert_allclose(orz.credit(view, learner, {}).values, (plain - plain.mean()) / plain.std(), rtol=1e-6)
    values, before = torch.tensor([0.9, 0.1, 0.5]).double(), torch.tensor([0.5, 0.2, 0.45]).double()
    returns = torch.tensor([1.0, 0.0, 0.0]).double()
    clipped = [max((0.9 - 1) ** 2, (0.7 - 1) ** 2), 0.1**2, 0.5**2]
    np.testing.assert_allclose(orz.value_loss(values, before, returns).numpy(), [0.5 * one for one in clipped])
    critic = scorer(orz.Critic, model_path, lr=1e-2, updates=8)
    assert not critic.score(BATCH)["value"].any(), "a critic that knows nothing gives REINFORCE"
    for _ in range(10):
        critic.learn(BATCH, judged(BATCH, [1, 0, 1]))
    found = critic.score(BATCH)["value"]
    error = found - np.array([1, 1, 1, 0, 1, 1])
    assert 1 - error.var() / np.array([1, 1, 1, 0, 1, 1]).var() > 0.3, "explained variance"


def test_tgpo_by_its_definition() -> None:
    tgpo = example("tgpo")
    settings = {"weight": 0.1, "until": 200.0}
    learner = make_config("x", algorithm="grpo").learner.model_copy(update={"settings": settings})
    logprobs = torch.tensor([-1.0, -2.0, -0.5]).double().requires_grad_()
    likeliest = torch.tensor([[-0.3], [-0.9], [-1.5]]).double()
    common = {
        "entropies": torch.ones(3), "behavior": logprobs.detach(), "anchor": logprobs.detach(),
        "sequence_credit": torch.tensor([1.0, -0.5]).double(), "token_credit": None, "max_tokens": 4,
        "weights": torch.ones(2).double(), "trained": torch.tensor([True, True, True]),
        "scope": torch.tensor([True, True, True]), "cu_seqlens": torch.tensor([0, 2, 3]),
    }  # fmt: skip
    terms = Terms(logprobs=logprobs, alternatives=likeliest, iteration=50, **common)
    cross_entropy = statistics.fmean([statistics.fmean([0.3, 0.9]), 1.5])
    assert tgpo.loss(terms, learner).item() == pytest.approx(-0.25 + 0.075 * cross_entropy)
    for iteration, weight in ((200, 0.0), (50, 0.075)):
        own = Terms(logprobs=logprobs, alternatives=logprobs[:, None], iteration=iteration, **common)
        (found,) = torch.autograd.grad(tgpo.loss(own, learner), logprobs)
        (plain,) = torch.autograd.grad(tgpo.GRPO.loss(own, learner), logprobs)
        likelihood = torch.tensor([0.25, 0.25, 0.5]).double()
        np.testing.assert_allclose(found, plain - weight * likelihood, rtol=1e-12)
