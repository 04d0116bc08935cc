"""A claim dealt to steps, ranks and micro-batches, and what a micro-batch holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmdflow import _rust_buffer
from pmdflow.learner.batch import BUCKET, is_whole, pack, plan_iteration
from pmdflow.learner.flops import Speed
from pmdflow.types import ClaimPlan, Mask
from tests.support.learner import make_batch

torch.set_num_threads(1)


@given(
    seed=st.integers(0, 50),
    steps=st.integers(1, 6),
    ranks=st.integers(1, 4),
    limit=st.integers(20, 200),
    packing=st.booleans(),
)
@settings(max_examples=40)
def test_plan_covers_every_trained_trajectory_once(seed, steps, ranks, limit, packing):
    batch = make_batch(seed=seed)
    trained = (batch.mask & Mask.TRAINED) != 0
    lengths = np.diff(batch.cu_seqlens)
    plans = plan_iteration(
        batch, counts=batch.count(Mask.TRAINED), steps=steps, ranks=ranks, tokens_per_microbatch=limit, packing=packing
    )
    assert len(plans) == steps
    seen, last_group = [], -1
    for plan in plans:
        assert len({len(rank) for rank in plan.ranks}) == 1
        for micro in (micro for rank in plan.ranks for micro in rank if micro):
            if packing:
                assert sum(lengths[list(micro)]) <= limit
                continue
            assert len(micro) * max(lengths[list(micro)]) <= limit
            assert min(lengths[list(micro)]) >= BUCKET * max(lengths[list(micro)])
        members = [index for rank in plan.ranks for micro in rank for index in micro]
        if members:
            groups = batch.groups[members]
            assert groups.min() > last_group, "a group is in one step, and steps follow claim order"
            last_group = groups.max()
        assert plan.num_sequences == len(members)
        seen += members
        loads = [sum(lengths[i] for micro in rank for i in micro) for rank in plan.ranks]
        assert max(loads) - min(loads) <= lengths.max()
    rows = np.repeat(np.arange(len(lengths)), lengths)
    assert sorted(seen) == sorted(set(rows[trained].tolist()))
    assert sum(plan.num_tokens for plan in plans) == trained.sum()


def test_plan_is_balanced_and_refuses_what_does_not_fit():
    batch = make_batch()
    trained = batch.count(Mask.TRAINED)
    counts = [
        len(set(batch.groups[[i for m in p.ranks[0] for i in m]]))
        for p in plan_iteration(batch, counts=trained, steps=4, ranks=1, tokens_per_microbatch=64)
    ]
    assert counts == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="tokens_per_microbatch is 4"):
        plan_iteration(batch, counts=trained, steps=1, ranks=1, tokens_per_microbatch=4)
    with pytest.raises(ValueError, match="adjacent"):
        plan_iteration(
            replace(batch, groups=batch.groups[::-1] % 2), counts=trained, steps=1, ranks=1, tokens_per_microbatch=64
        )


def test_ranks_have_equally_much_to_compute_where_attention_is_costly():
    """2,048 answers of lognormal length over 8 ranks: with the cost of attention the slowest rank is hardly slower."""
    lengths = np.clip(np.random.default_rng(0).lognormal(7.5, 1.0, 2048), 32, 32768).astype(np.int64)
    quadratic = Speed(per_token=2 * 7.6e9, per_square=2.0 * 36 * 32 * 128, passes=4, peak=None).quadratic

    def slowest(quadratic: float) -> float:
        (ranks,) = _rust_buffer.pack(lengths.tolist(), ranks=8, limit=36864, quadratic=quadratic)
        costs = np.array([[sum(lengths[i] + cost * float(lengths[i]) ** 2 for i in m) for m in rank] for rank in ranks])
        return float(costs.max(0).sum() / costs.mean(0).sum())  # all ranks wait for the slowest in each micro-batch

    cost = quadratic
    assert slowest(quadratic) < 1.03 and slowest(0.0) > 1.1
    batch = make_batch(groups=12)
    options = {"counts": batch.count(Mask.TRAINED), "steps": 1, "ranks": 3, "tokens_per_microbatch": 64}
    plain, weighed = (plan_iteration(batch, **options, quadratic=cost) for cost in (0.0, 1.0))
    assert plain != weighed, "the plan knows it"


def test_a_recorded_plan_deals_the_groups_and_not_the_number_of_steps():
    batch = make_batch()

    def dealt(plan, steps):
        options = {"counts": batch.count(Mask.TRAINED), "steps": steps, "ranks": 1, "tokens_per_microbatch": 64}
        plans = plan_iteration(replace(batch, plan=plan), **options)
        return [sorted({int(batch.groups[i]) for micro in plan.ranks[0] for i in micro}) for plan in plans]

    steps = np.array([2, 0, 2, 0, 2, 0], np.int32)
    plan = ClaimPlan(steps=steps, num_steps=4, rule="by_hand", seed=None)
    assert dealt(plan, 2) == [[1, 3, 5], [], [0, 2, 4], []]
    assert dealt(None, 2) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="iteration 1 has 6 groups, its plan deals 5"):
        dealt(replace(plan, steps=steps[1:]), 2)


@pytest.mark.parametrize("packing", [True, False])
def test_pack_predicts_each_generated_token_from_the_position_before(packing):
    batch = make_batch()
    trained = (batch.mask & Mask.TRAINED) != 0
    micro = pack(batch, trained=trained, trajectories=(3, 0), packing=packing)
    assert micro.tokens.shape == (1, sum(micro.lengths)) if packing else (2, max(micro.lengths))
    offsets = (0, micro.lengths[0] if packing else micro.tokens.shape[1])
    for row, (trajectory, offset) in enumerate(zip((3, 0), offsets, strict=True)):
        first, last = batch.cu_seqlens[trajectory], batch.cu_seqlens[trajectory + 1]
        generated = np.flatnonzero(batch.mask[first:last] & Mask.GENERATED)
        part = slice(micro.cu_seqlens[row], micro.cu_seqlens[row + 1])
        np.testing.assert_array_equal(micro.positions[part], offset + generated - 1)
        np.testing.assert_array_equal(micro.targets[part], batch.tokens[first + generated])
        np.testing.assert_array_equal(micro.trained[part], trained[first + generated])
        np.testing.assert_array_equal(micro.versions[part], batch.versions[first + generated])
        np.testing.assert_array_equal(
            micro.tokens.reshape(-1)[offset : offset + micro.lengths[row]], batch.tokens[first:last]
        )


@pytest.mark.parametrize("quadratic", [0.0, 0.01])
def test_whole_groups_stay_on_a_rank_where_balance_allows(quadratic: float) -> None:
    seen = set()
    for seed in range(12):
        batch = make_batch(seed=seed, groups=3 + seed % 8)
        counts, scored = batch.count(Mask.TRAINED), np.ones(len(batch.groups), np.bool_)
        given_ = {"counts": counts, "steps": 1, "ranks": 2, "tokens_per_microbatch": 64, "quadratic": quadratic}
        (apart,), (plan,) = plan_iteration(batch, **given_), plan_iteration(batch, **given_, scored=scored)
        rows = [row for rank in plan.ranks for micro in rank for row in micro]
        assert sorted(rows) == list(range(len(batch.groups))), "untrained members are scored too"
        assert (plan.num_sequences, plan.num_tokens) == (apart.num_sequences, apart.num_tokens)
        whole = is_whole([plan], batch.groups)
        seen.add(whole)
        if whole:
            lengths = np.diff(batch.cu_seqlens)
            loads = [sum(_cost(lengths[row], quadratic) for micro in rank for row in micro) for rank in plan.ranks]
            assert max(loads) <= 1.05 * (sum(loads) + _cost(lengths.max(), quadratic)) / 2
    assert seen == {True, False}


def _cost(length: int, quadratic: float) -> float:
    return float(length + quadratic * length**2)
