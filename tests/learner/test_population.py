"""What the losses converge to: a tabular softmax policy, exact expectations, the minimum found numerically.

Every outcome is one token. The batch enumerates the outcomes, and `weights` turn its mean into the expectation under
the reference policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pmdflow.learner.advantage import boltzmann_weights, pmd_mean, pmd_partition
from pmdflow.learner.objective import pmd_loss, weighted_sft_loss

torch.set_num_threads(1)
REWARDS = np.array([1.0, 0.0, 0.5, 0.0, -1.0])
INITIAL = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


def partition_advantages(rewards: np.ndarray, policy: np.ndarray, tau: float) -> np.ndarray:
    """r - tau log E exp(r / tau) under `policy`, by the function for samples.

    A mean over n equally frequent samples is the expectation if each exp(r / tau) is multiplied by n p, that is if
    tau log(n p) is added to its reward.
    """
    shift = tau * np.log(len(policy) * policy)
    return pmd_partition(rewards + shift, [0] * len(policy), tau=tau, leave_one_out=False) - shift


def minimum(policy: np.ndarray, loss: Callable[[Tensor], Tensor]) -> np.ndarray:
    """The distribution at which `loss` of its log-probs [n, 1] is least, by LBFGS from `policy`."""
    logits = torch.from_numpy(np.log(policy)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-15,
        tolerance_change=0.0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0)[:, None])
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return logits.detach().softmax(0).numpy()


def iterate(policy: np.ndarray, advantages: np.ndarray, tau: float) -> np.ndarray:
    """The minimiser of the population loss of policy mirror descent with `policy` as reference."""
    reference = torch.from_numpy(np.log(policy))[:, None]
    mask = torch.ones_like(reference, dtype=torch.bool)
    weights = torch.from_numpy(policy * len(policy))
    return minimum(
        policy, lambda lp: pmd_loss(lp, reference, torch.from_numpy(advantages), mask, tau=tau, weights=weights)
    )


def lambert_w(log_x: np.ndarray) -> np.ndarray:
    """W(x) of x = exp(log_x) > 0 by Newton's method on w + log w = log x, which never overflows."""
    w = np.where(log_x > 1, np.maximum(log_x, 1.0), np.exp(np.minimum(log_x, 1.0)))
    for _ in range(100):
        w = np.maximum(w - (w + np.log(w) - log_x) / (1 + 1 / w), 1e-300)
    return w


def mean_target(policy: np.ndarray, rewards: np.ndarray, tau: float) -> tuple[np.ndarray, float]:
    """pi exp(D / tau - W(lambda exp(D / tau))) and the lambda that normalises it, by bisection."""
    scaled = (rewards - policy @ rewards) / tau

    def distribution(log_lambda: float) -> np.ndarray:
        return policy * np.exp(scaled - lambert_w(log_lambda + scaled))

    low, high = -200.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle).sum() > 1 else (low, middle)
    return distribution(high), math.exp(high)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(first - second).sum() / 2)


def boltzmann(policy: np.ndarray, rewards: np.ndarray, tau: float) -> np.ndarray:
    """policy exp(r / tau) / Z."""
    weights = policy * np.exp((rewards - rewards.max()) / tau)
    return weights / weights.sum()


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_partition_iterations_reach_the_boltzmann_distribution(tau):
    policy, iterations = INITIAL, 4
    for k in range(1, iterations + 1):
        policy = iterate(policy, partition_advantages(REWARDS, policy, tau), tau)
        ideal = boltzmann(INITIAL, REWARDS, tau / k)
        print(f"tau {tau}, {k} iterations: distance to pi_0 exp({k} r / tau) / Z is {distance(policy, ideal):.1e}")
        assert distance(policy, ideal) < 1e-6


def test_weighted_sft_reaches_the_boltzmann_distribution_in_one_iteration():
    tau, n = 0.5, len(INITIAL)
    shifted = REWARDS + tau * np.log(n * INITIAL)
    weights = torch.from_numpy(boltzmann_weights(shifted, [0] * n, tau=tau))
    mask = torch.ones(n, 1, dtype=torch.bool)
    policy = minimum(INITIAL, lambda lp: weighted_sft_loss(lp, mask, weights))
    assert distance(policy, boltzmann(INITIAL, REWARDS, tau)) < 1e-6


@pytest.mark.parametrize(
    ("policy", "rewards", "tau"),
    [
        (np.array([0.05, 0.95]), np.array([1.0, 0.0]), 0.1),
        (INITIAL, REWARDS, 0.5),
        (np.array([0.5, 0.5]), np.array([1.0, 0.0]), 0.2),
    ],
)
def test_mean_baseline_reaches_the_lambert_distribution(policy, rewards, tau):
    reached = iterate(policy, rewards - policy @ rewards, tau)
    target, normaliser = mean_target(policy, rewards, tau)
    ideal = boltzmann(policy, rewards, tau)
    kl = float(policy @ np.log(policy / reached))
    print(
        f"pi_t {policy.round(3)}, tau {tau}: reached {reached.round(4)}; distance to the Lambert form "
        f"{distance(reached, target):.1e}, to the KL target {distance(reached, ideal):.3f}; lambda {normaliser:.4f}"
    )
    assert distance(reached, target) < 1e-6
    assert kl == pytest.approx(normaliser, rel=1e-5)
    assert distance(reached, ideal) > 0.005


def test_the_published_example():
    """At pi_t(correct) = 0.05 and tau = 0.1 the mean baseline goes to 0.567 where the KL target is 0.999.

    Source: arXiv:2602.05933.
    """
    policy, rewards, tau = np.array([0.05, 0.95]), np.array([1.0, 0.0]), 0.1
    # Enumerated as 20 samples of equal weight: the group mean is then the expectation.
    samples = pmd_mean([1.0] + [0.0] * 19, ["p"] * 20, leave_one_out=False)
    np.testing.assert_allclose(samples[:2], rewards - policy @ rewards, rtol=1e-12)
    reached = iterate(policy, samples[:2], tau)
    ideal = iterate(policy, partition_advantages(rewards, policy, tau), tau)
    print(f"right answer: mean baseline {reached[0]:.4f}, partition {ideal[0]:.4f}")
    assert reached[0] == pytest.approx(0.567, abs=5e-4)
    assert ideal[0] == pytest.approx(0.999, abs=5e-4)
    assert mean_target(policy, rewards, tau)[1] == pytest.approx(0.624, abs=1e-3)
