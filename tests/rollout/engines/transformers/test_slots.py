"""Slots of the transformers engine: a plan, and drawing from its logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.rollout.engines.transformers.sampling import sample
from pmdflow.rollout.engines.transformers.slots import HeldSequence, plan_slots
from tests.support.numeric import assert_close


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (1.7, 0.8)])
def test_sample_draws_from_the_tempered_and_truncated_distribution(temperature: float, top_p: float) -> None:
    num_draws = 200_000
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    logits[7] = -torch.inf
    tokens, logprobs = sample(
        logits.expand(num_draws, -1),
        temperatures=torch.full((num_draws,), temperature),
        greedy=None,
        top_p=None if top_p == 1 else torch.full((num_draws,), top_p),
        generator=torch.Generator().manual_seed(0),
    )
    probs = torch.softmax(logits / temperature, dim=-1)
    # Of 40 terms and a logarithm; logits go up to 10.
    assert_close(logprobs, probs.log()[tokens], roundings=41, size=10.0)
    ordered, index = probs.sort(descending=True)
    kept = index[: int((ordered.cumsum(0) < top_p).sum()) + 1] if top_p < 1 else index
    target = torch.zeros(40).index_copy_(0, kept, probs[kept] / probs[kept].sum())
    frequency = torch.bincount(tokens, minlength=40) / num_draws
    assert (frequency[target == 0] == 0).all()
    assert 0.5 * (frequency - target).abs().sum() < 0.01


@given(data=st.data())
def test_slot_plan_is_a_permutation_that_groups_similar_lengths(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 24))
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True))
    held = [
        HeldSequence(
            id=100 + slot,
            tokens=[0] * (length + 1),
            limit=data.draw(st.integers(0, 1)),
            remaining=9,
            temperature=1.0,
            top_p=1.0,
            slot=slot,
            cached=length,
        )
        for slot in slots
        for length in [data.draw(st.integers(0, 3000))]
    ]
    ready, others = [s for s in held if s.ready], [s for s in held if not s.ready]
    plan = plan_slots(ready, others, num_slots=num_slots)
    assert len(set(plan.slots.values())) == len(held) and set(plan.slots.values()) <= set(range(num_slots))
    assert {plan.slots[s.id] for s in ready} == set(range(len(ready)))
    assert [first for first, _, _ in plan.groups] == [0, *(end for _, end, _ in plan.groups)][: len(plan.groups)]
    assert len(plan.groups) <= 3 and (not ready or plan.groups[-1][1] == len(ready))
    for s in ready:
        length = next(length for first, end, length in plan.groups if first <= plan.slots[s.id] < end)
        longest = max(other.cached + 1 for other in ready)
        assert s.cached + 1 <= length <= max(2 * (s.cached + 1), 64, longest / 2 + 1)
    again = [replace(s, slot=plan.slots[s.id]) for s in held]
    assert plan_slots([s for s in again if s.ready], [s for s in again if not s.ready], num_slots=num_slots) == plan
