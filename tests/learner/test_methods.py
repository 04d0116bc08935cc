"""Credit of the citing papers' methods against their definitions, written again here, and the edges of each."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from pmdflow.learner.advantage import grpo
from pmdflow.learner.credit import gdpo, gigpo, negative_reinforcement, opd, opefo, ucpo, vopd
from pmdflow.types import Mask
from tests.support.learner import make_batch, make_config

torch.set_num_threads(1)
RNG = np.random.default_rng(0)


def test_ucpo_by_the_paper_and_its_code() -> None:
    means = np.array([-10 / 20, -30 / 30, -24 / 12, -8 / 10])
    found = ucpo([1, 1, 1, 0], [0, 0, 0, 0], means, [1, 1, 1, 0])
    np.testing.assert_allclose(found, [0.44207, 0.46937, 0.58856, -1.5], atol=1e-5)
    inverse = [math.exp(-m) for m in means[:3]]  # 1 / q up to a factor
    expected = [1.5 * (0.8 / 3 + 0.2 * own / sum(inverse)) for own in inverse]
    np.testing.assert_allclose(found[:3], expected, rtol=1e-7)


def test_ucpo_keeps_the_mass_and_favours_the_rare() -> None:
    rewards, groups = np.array([1.0, 0.6, 0, 1, 1, 1, 1, 0, 1]), np.array(list("aaabbbccd"))
    means, right = RNG.normal(-1, 1, 9), rewards >= 0.5
    base = grpo(rewards, groups, eps=1e-8)
    found = ucpo(rewards, groups, means, right)
    for label in "abcd":
        own = groups == label
        assert found[own & right].sum() == pytest.approx(base[own & right].sum(), abs=1e-12)
        np.testing.assert_array_equal(found[own & ~right], base[own & ~right])
    assert (np.argsort(found[[0, 1]]) == np.argsort(-means[[0, 1]])).all(), "the rarest gains most"
    np.testing.assert_allclose(found[3:6], 0, atol=1e-12)
    np.testing.assert_array_equal(found[6:], base[6:])
    np.testing.assert_allclose(ucpo(rewards, groups, means, right, tau=0)[6:], base[6:])
    extreme = ucpo([1, 1, 0], [0, 0, 0], [0.0, -1000.0, -1.0], [1, 1, 0])
    assert np.isfinite(extreme).all() and extreme[1] > extreme[0], "q is floored"
    with pytest.raises(ValueError, match="it is a share"):
        ucpo([1.0], [0], [0.0], [1], tau=2)
    with pytest.raises(ValueError, match="must be like rewards"):
        ucpo([1.0], [0], [0.0, 1.0], [1])


def test_negative_reinforcement_by_its_schedules() -> None:
    right = [True, False]
    expected = {"exponential": 0.5 + math.exp(-0.03 * 50), "cosine": 1.49384, "accuracy": 0.5 + 0.5}
    for schedule, beta in expected.items():
        found = negative_reinforcement(right, iteration=50, total=1000, schedule=schedule)
        np.testing.assert_allclose(found, [0.0575, -beta], atol=1e-5)
    betas = [-negative_reinforcement([False], iteration=t, total=100)[0] for t in range(0, 300, 10)]
    assert betas == sorted(betas, reverse=True) and betas[0] == 1.5 and betas[-1] == pytest.approx(0.5, abs=1e-3)
    late = negative_reinforcement(right, iteration=10**6, total=100, schedule="cosine")
    np.testing.assert_allclose(late, [0.2, -0.5])
    assert negative_reinforcement([], iteration=1, total=10, schedule="accuracy").shape == (0,)
    with pytest.raises(ValueError, match="use one of exponential, cosine, accuracy"):
        negative_reinforcement(right, iteration=1, total=10, schedule="linear")


def test_gdpo_normalizes_each_reward_by_itself() -> None:
    components, groups = RNG.normal(size=(9, 2)) * [1.0, 100.0], np.array([0, 1, 0, 1, 0, 1, 0, 1, 1])
    expected = np.zeros(9)
    for column, weight in ((0, 1.0), (1, 0.5)):
        for group in (0, 1):
            own = [components[i, column] for i in range(9) if groups[i] == group]
            for i in np.flatnonzero(groups == group):
                z = (components[i, column] - statistics.fmean(own)) / (statistics.stdev(own) + 1e-8)
                expected[i] += weight * z
    np.testing.assert_allclose(gdpo(components, groups, weights=[1.0, 0.5]), expected, rtol=1e-9)
    np.testing.assert_allclose(gdpo(components[:, :1], groups, decorrelate="zca"), gdpo(components[:, :1], groups))


def test_gdpo_whitening() -> None:
    groups = np.repeat(np.arange(5), 4)
    one, other = RNG.normal(size=(2, 20))
    single = gdpo(one[:, None], groups)
    twice = gdpo(np.column_stack([one, one]), groups, decorrelate="zca")
    np.testing.assert_allclose(twice, math.sqrt(2) * single, rtol=1e-7)
    mixed = np.column_stack([one, one + 0.3 * other, np.full(20, 7.0)])
    columns = [gdpo(mixed, groups, weights=np.eye(3)[i], decorrelate="zca") for i in range(3)]
    z = [gdpo(column[:, None], groups) for column in mixed.T]
    covariance = np.array([[a @ b for a in columns[:2]] for b in columns[:2]]) / (20 - 5)
    np.testing.assert_allclose(covariance, np.eye(2), atol=1e-6)
    correlation = np.array([[a @ b for a in z[:2]] for b in z[:2]]) / (20 - 5)
    root = torch.linalg.matrix_exp(-0.5 * torch.from_numpy(_logarithm(correlation))).numpy()
    np.testing.assert_allclose(np.column_stack(columns[:2]), np.column_stack(z[:2]) @ root, atol=1e-6)
    np.testing.assert_array_equal(columns[2], 0)  # a constant reward leaves the subspace
    few = gdpo(RNG.normal(size=(2, 5)), [0, 0], decorrelate="zca")
    assert np.isfinite(few).all() and np.isfinite(gdpo(np.ones((1, 2)), [0], decorrelate="zca")).all()
    assert gdpo(np.zeros((0, 2)), [], decorrelate="zca").shape == (0,)
    with pytest.raises(ValueError, match="there are 2 rewards"):
        gdpo(np.ones((3, 2)), [0, 0, 0], weights=[1.0])


def _logarithm(matrix: np.ndarray) -> np.ndarray:
    """By its series of square roots: another way than eigenvalues of the whitening."""
    root, size = matrix, 1
    while np.abs(root - np.eye(2)).max() > 1e-4:
        x, y = root, np.eye(2)
        for _ in range(60):  # Denman-Beavers
            x, y = (x + np.linalg.inv(y)) / 2, (y + np.linalg.inv(x)) / 2
        root, size = x, 2 * size
    e = root - np.eye(2)
    return size * (e - e @ e / 2 + e @ e @ e / 3)


def test_opefo_balances_the_flow() -> None:
    flow = np.array([0.3, -0.5, 0.1, 0.0, -0.4])
    size, weights = opefo(flow)
    assert size == pytest.approx((0.9 - 0.4) / 1.3) and weights[3] == 1
    assert weights @ flow == pytest.approx(0, abs=1e-12)
    assert opefo([1.0, 2.0]) == (-0.5, pytest.approx([0.5, 0.5]))
    assert opefo([1.0, 2.0], cap=None)[0] == -1
    assert opefo([0.0, 0.0])[0] == 0 and opefo([])[1].shape == (0,)
    with pytest.raises(ValueError, match="not finite"):
        opefo([np.nan])


def test_opefo_leaves_the_entropy_of_a_softmax_where_it_is() -> None:
    """To first order, a step on the logits with the weights keeps the sum of entropies; without them it does not."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, advantages = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1.0, -1, 0.5, 1, -2, 0.3]).double()
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    by_logit = -p * (p.log() + entropy)
    step = torch.nn.functional.one_hot(tokens, 5) - p
    flow = (advantages[:, None] * step * by_logit).sum(1)
    weights = torch.from_numpy(opefo(flow.numpy(), cap=None)[1])

    def change(factors: torch.Tensor) -> float:
        moved = (logits + 1e-6 * (factors * advantages)[:, None] * step).softmax(1)
        return float(-(moved * moved.log()).sum() - entropy.sum()) / 1e-6

    assert change(torch.ones(6)) == pytest.approx(float(flow.sum()), rel=1e-4) and abs(float(flow.sum())) > 0.01
    assert change(weights) == pytest.approx(0, abs=1e-4)


TURNS = {
    "turn_trajectory": [0, 0, 1, 1, 1, 2, 2],
    "turn_keys": ["start", "door", "start", "start", "key", "start", "door"],
    "turn_rewards": [0.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0],
}


def test_gigpo_by_its_definition() -> None:
    returns, groups, gamma = np.array([1.0, 0.5, 0.0]), np.array([7, 7, 7]), 0.9
    g = [0.9, 1.0, 0.45, 0.5, 0.0, 0.0, 0.0]
    start, door = statistics.fmean([g[0], g[2], g[3], g[5]]), statistics.fmean([g[1], g[6]])
    steps = [g[0] - start, g[1] - door, g[2] - start, g[3] - start, 0.0, g[5] - start, g[6] - door]
    episode = [0.5, 0.5, 0, 0, 0, -0.5, -0.5]
    found = gigpo(returns, groups, **TURNS, gamma=gamma, weight=2.0)
    np.testing.assert_allclose(found, np.array(episode) + 2 * np.array(steps), atol=1e-12)
    np.testing.assert_allclose(gigpo(returns, groups, **TURNS, gamma=gamma, weight=0), episode, atol=1e-12)
    scaled = gigpo(returns, groups, **TURNS, gamma=gamma, scale_by_std=True)
    deviation = statistics.stdev([g[0], g[2], g[3], g[5]])
    assert scaled[0] == pytest.approx(0.5 / (0.5 + 1e-6) + (g[0] - start) / (deviation + 1e-6))


def test_gigpo_of_a_claim(start, model_path) -> None:
    """Turns that answer the same observation are found from a claim's tokens, and each turn gets its credit."""
    batch = make_batch(groups=2)
    flags, tokens = batch.mask.copy(), batch.tokens.copy()
    turns: list[list[tuple[int, int, bytes]]] = []
    for row in range(6):
        first, last = batch.cu_seqlens[row : row + 2]
        begin = first + batch.prompt_lengths[row]
        tokens[first:begin] = tokens[batch.cu_seqlens[row // 3 * 3]]  # the group's prompt, but for its length
        flags[begin:last] = Mask.GENERATED | Mask.TRAINED
        own, start_of, said = [], begin, tokens[first:begin].tobytes()
        if last - begin > 4:
            flags[begin + 2], tokens[begin + 2] = 0, 77
            own, start_of, said = [(begin, begin + 2, said)], begin + 3, tokens[begin + 2 : begin + 3].tobytes()
        turns.append([*own, (start_of, last, said)])
    batch = replace(batch, mask=flags, tokens=tokens)
    flat = [(row, turn) for row, own in enumerate(turns) for turn in own]
    rewards = [batch.rewards[row] if turn is turns[row][-1] else 0.0 for row, turn in flat]
    expected = gigpo(
        batch.rewards, batch.groups, [row for row, _ in flat], [turn[2].hex() for _, turn in flat], rewards, gamma=0.95
    )
    assert sum(len(own) > 1 for own in turns) >= 2
    result = start(make_config(model_path, algorithm="gigpo")).train(batch)
    lengths = [turn[1] - turn[0] for _, turn in flat]
    for row in range(6):
        mine = [index for index, (owner, _) in enumerate(flat) if owner == row]
        mean = np.average(expected[mine], weights=[lengths[index] for index in mine])
        assert result.advantages[row] == pytest.approx(mean, abs=1e-12)
    seen = [(batch.groups[row], turn[2]) for row, turn in flat]
    shared = np.mean([seen.count(one) > 1 for one in seen])
    assert result.metrics["learner/credit_shared_states_share"] == pytest.approx(shared) and 0 < shared < 1


def test_gigpo_keeps_prompt_groups_apart() -> None:
    turns = {"turn_trajectory": [0, 1, 2, 3], "turn_keys": [5, 5, 5, 5], "turn_rewards": [1.0, 0.0, 3.0, 3.0]}
    found = gigpo([1, 1, 1, 1], [0, 0, 1, 1], **turns, gamma=1.0)
    np.testing.assert_allclose(found, [0.5, -0.5, 0, 0])
    alone = gigpo([2.0], [0], [0], [1], [9.0], gamma=1.0)
    assert alone == 2.0, "one episode has its reward, and a state seen once adds nothing"
    assert gigpo([], [], [], [], [], gamma=1.0).shape == (0,)
    with pytest.raises(ValueError, match="a turn is of episode 4"):
        gigpo([1.0], [0], [4], [1], [0.0], gamma=1.0)


def test_distillation_by_hand_and_in_expectation() -> None:
    student, teacher = np.log([[0.6, 0.3, 0.1]]), np.log([[0.3, 0.6, 0.1]])
    assert vopd(student, teacher, student[:, 0], teacher[:, 0])[0] == pytest.approx(-0.48520, abs=1e-5)
    student, teacher = (np.log(RNG.dirichlet(np.ones(6), size=4)) for _ in range(2))
    mean = sum(np.exp(student[:, k]) * vopd(student, teacher, student[:, k], teacher[:, k]) for k in range(6))
    np.testing.assert_allclose(mean, 0, atol=1e-15)
    plain = sum(np.exp(student[:, k]) * opd(teacher[:, k], student[:, k]) for k in range(6))
    np.testing.assert_allclose(plain, -(np.exp(student) * (student - teacher)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(opd([-1.0, -9.0], [-2.0, -1.0], clip=2.0), [1.0, -2.0])
    never = vopd([[0.0, -np.inf]], [[-0.5, -1.0]], [0.0], [-0.5])
    assert never[0] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="must score the same tokens"):
        opd([1.0], [1.0, 2.0])


@pytest.mark.parametrize("name", ["ucpo", "a_nsr", "gdpo", "opefo"])
def test_methods_train(start, model_path, name: str) -> None:
    batch = make_batch()
    batch.components["correct"] = batch.rewards
    metrics = start(make_config(model_path, algorithm=name)).train(batch).metrics
    assert metrics["learner/grad_norm"] > 0
    if name == "opefo":
        assert -0.5 <= metrics["learner/credit_lambda"] <= 0.5
