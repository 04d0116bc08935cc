"""Advantages against independent recomputation, exactness on equal rewards, overflow, and interleaved groups."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.learner.advantage import boltzmann_weights, grpo, keep_groups, pmd_mean, pmd_partition
from pmdflow.reward.length import length_reward

REWARDS = [1.0, 0.0, 0.5, -2.0, 3.0, 0.25, 7.0]
GROUPS = ["a", "b", "a", "b", "a", "b", "lonely"]
FINITE = st.floats(-1e3, 1e3, allow_nan=False, allow_infinity=False)


def members(groups, index):
    return [j for j, group in enumerate(groups) if group == groups[index]]


def log_mean_exp(values, tau):
    """tau log mean exp(v / tau) in 60 decimal digits: no shift is needed where nothing overflows."""
    getcontext().prec = 60
    total = sum((Decimal(value) / Decimal(tau)).exp() for value in values)
    return float(Decimal(tau) * (total / len(values)).ln())


def test_pmd_mean_is_reward_minus_mean_of_others():
    expected = []
    for i, reward in enumerate(REWARDS):
        others = [REWARDS[j] for j in members(GROUPS, i) if j != i]
        expected.append(reward - (sum(others) / len(others) if others else 0.0))
    np.testing.assert_allclose(pmd_mean(REWARDS, GROUPS), expected, rtol=1e-14)


def test_pmd_mean_options():
    whole = pmd_mean(REWARDS, GROUPS, leave_one_out=False)
    mean_a = (1.0 + 0.5 + 3.0) / 3
    np.testing.assert_allclose(whole[[0, 2, 4]], np.array([1.0, 0.5, 3.0]) - mean_a, rtol=1e-14)
    assert pmd_mean([5.0], [0]) == 5.0
    assert pmd_mean([5.0], [0], singleton="zero") == 0.0
    assert pmd_mean([5.0], [0], leave_one_out=False) == 0.0
    assert pmd_partition([5.0], [0], tau=1.0) == 5.0
    assert pmd_partition([5.0], [0], tau=1.0, leave_one_out=False) == 0.0
    assert pmd_mean(REWARDS, GROUPS).dtype == np.float64
    with pytest.raises(ValueError, match="singleton"):
        pmd_mean([1.0], [0], singleton="mean")


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("tau", [0.01, 0.05, 1.0, 1e6])
def test_pmd_partition_matches_sixty_digits(tau, leave_one_out):
    expected = []
    for i, reward in enumerate(REWARDS):
        compared = [REWARDS[j] for j in members(GROUPS, i) if j != i or not leave_one_out]
        alone = len(members(GROUPS, i)) == 1 and leave_one_out
        expected.append(reward if alone else reward - log_mean_exp(compared, tau))
    np.testing.assert_allclose(
        pmd_partition(REWARDS, GROUPS, tau=tau, leave_one_out=leave_one_out), expected, rtol=1e-9, atol=1e-12
    )


def test_pmd_partition_survives_overflow_and_tends_to_the_maximum_of_the_others():
    rewards, groups = [1e4, -1e4, 0.0, 9e3], [0, 0, 0, 0]
    value = pmd_partition(rewards, groups, tau=1e-4)
    np.testing.assert_allclose(value, [1e3, -2e4, -1e4, -1e3], atol=1e-3)
    np.testing.assert_allclose(pmd_partition(rewards, groups, tau=1e-300), [1e3, -2e4, -1e4, -1e3])
    np.testing.assert_allclose(pmd_partition(rewards, groups, tau=1e12), pmd_mean(rewards, groups), rtol=1e-6)


def test_pmd_partition_floor_is_openkimi():
    tau, rewards = 0.01, np.array([1.0, -1.0, -1.0, -1.0])
    value = pmd_partition(rewards, [0] * 4, tau=tau, floor=1e-8)
    # The only right one: its others' mean underflows to the floor, so its advantage is -tau ln 1e-8.
    assert value[0] == pytest.approx(-tau * math.log(1e-8), rel=1e-12)
    assert value[1] == pytest.approx(-2 + tau * math.log(3), rel=1e-9)
    with pytest.raises(ValueError, match="floor"):
        pmd_partition(rewards, [0] * 4, tau=tau, floor=0.0)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_tau_is_refused(tau):
    with pytest.raises(ValueError, match="tau"):
        pmd_partition([1.0, 2.0], [0, 0], tau=tau)
    with pytest.raises(ValueError, match="tau"):
        boltzmann_weights([1.0, 2.0], [0, 0], tau=tau)


def test_boltzmann_weights():
    weights = boltzmann_weights(REWARDS, GROUPS, tau=0.5)
    for i, reward in enumerate(REWARDS):
        group = members(GROUPS, i)
        expected = math.exp(reward / 0.5) / (sum(math.exp(REWARDS[j] / 0.5) for j in group) / len(group))
        assert weights[i] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(boltzmann_weights([1e4, -1e4], [0, 0], tau=1e-4), [2.0, 0.0])


def test_keep_groups_is_an_open_interval():
    rewards, groups = [0.1] * 3 + [1.0, 1.0] + [0.0, 1.0], [0] * 3 + [1, 1] + [2, 2]
    np.testing.assert_array_equal(keep_groups(rewards, groups, low=0.1, high=1.0), [0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(keep_groups(rewards, groups), [True] * 7)


def test_grpo():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(grpo(rewards, [0] * 5), expected, rtol=1e-12)
    np.testing.assert_allclose(grpo(rewards, [0] * 5, scale_by_std=False), rewards - rewards.mean(), rtol=1e-12)


@given(reward=FINITE, size=st.integers(2, 9), tau=st.floats(1e-4, 1e4))
def test_equal_rewards_give_exactly_zero(reward, size, tau):
    rewards, groups = [reward] * size, [3] * size
    for loo in (True, False):
        assert not pmd_mean(rewards, groups, leave_one_out=loo).any()
        assert not pmd_partition(rewards, groups, tau=tau, leave_one_out=loo).any()
    assert not pmd_partition(rewards, groups, tau=tau, floor=1e-8).any()
    assert not grpo(rewards, groups).any()
    assert (boltzmann_weights(rewards, groups, tau=tau) == 1.0).all()


@given(
    data=st.lists(st.tuples(FINITE, st.integers(0, 3)), min_size=1, max_size=20),
    tau=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_order_of_trajectories_does_not_matter(data, tau, seed):
    rewards, groups = np.array([r for r, _ in data]), np.array([g for _, g in data])
    order = np.random.default_rng(seed).permutation(len(data))
    scale = np.abs(rewards).max() + tau
    for function in (pmd_mean, lambda r, g: pmd_partition(r, g, tau=tau), grpo):
        shuffled = function(rewards[order], groups[order])
        np.testing.assert_allclose(shuffled, function(rewards, groups)[order], rtol=1e-5, atol=1e-9 * scale)


def test_errors_name_the_index_and_the_shapes():
    with pytest.raises(ValueError, match="reward 2 is nan"):
        pmd_mean([0.0, 1.0, math.nan], [0, 0, 0])
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        grpo([0.0, 1.0], [0])
    assert pmd_mean([], []).shape == (0,)


@pytest.mark.parametrize("labels", [[1, "1", 1, "1"], torch.tensor([1, 2, 1, 2]), np.array(["x", "y", "x", "y"])])
def test_labels_of_any_kind_and_interleaved_groups(labels):
    rewards = torch.tensor([1.0, 10.0, 2.0, 30.0])
    np.testing.assert_array_equal(pmd_mean(rewards, labels), [-1.0, -20.0, 1.0, 20.0])
    np.testing.assert_array_equal(keep_groups(rewards, labels, low=5), [False, True, False, True])


def test_huge_rewards_and_small_tau_do_not_overflow():
    rewards = np.array([1e4, 1e4, -1e4, 0.0] * 2)
    groups = ["a", "a", "a", "a", 7, 7, 7, 7]
    with np.errstate(all="raise", under="ignore"):
        for floor in (None, 1e-8):
            for loo in (True, False):
                assert np.isfinite(pmd_partition(rewards, groups, tau=1e-4, leave_one_out=loo, floor=floor)).all()
        np.testing.assert_array_equal(boltzmann_weights(rewards, groups, tau=1e-4), [2.0, 2.0, 0.0, 0.0] * 2)
    floored = pmd_partition([1e4, 0.0], [0, 0], tau=1e-4, floor=1e-8)
    np.testing.assert_allclose(floored, [-1e-4 * math.log(1e-8), -1e4])


def test_length_reward():
    lengths = [10, 20, 30, 20, 5, 5]
    correct = [True, True, True, False, True, False]
    groups = [0, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(length_reward(lengths, correct, groups), [0.5, 0.0, -0.5, 0.0, 0.0, 0.0])
    # A short wrong answer earns nothing, a long one loses.
    np.testing.assert_allclose(length_reward([1, 3], [False, False], ["x", "x"]), [0.0, -0.5])
    with pytest.raises(ValueError, match="lengths"):
        length_reward([1, 2], [True], [0, 0])
