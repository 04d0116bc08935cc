"""Delays and bypasses of groups against a plain model of the order of admission."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmdflow.metrics.claim import episode_lengths
from pmdflow.metrics.order import AdmissionOrder, Claimed
from pmdflow.types import Claim
from tests.support.fixture_run import make_batch

SIZE = 2


def _claim(iteration: int, groups: list[int]) -> Claim:
    batch = Claim.of(make_batch(iteration, groups=len(groups), size=SIZE))
    batch.groups[:] = np.repeat(groups, SIZE)
    return batch


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_they_are_those_of_a_plain_loop(data: st.DataObject) -> None:
    order, admitted, trained, untrained = AdmissionOrder(), dict[int, int](), list[int](), list[int]()
    for iteration in range(1, 8):
        new = list(range(len(admitted), len(admitted) + data.draw(st.integers(1, 5))))
        order.admitted(new, iteration=iteration)
        admitted |= dict.fromkeys(new, iteration)
        untrained += new
        groups = data.draw(st.lists(st.sampled_from(untrained), min_size=1, max_size=4, unique=True))
        untrained = [group for group in untrained if group not in groups]
        if untrained and data.draw(st.booleans()):
            untrained.pop(0)  # evicted
        if not untrained:
            untrained.append(len(admitted))
            order.admitted(untrained, iteration=iteration)
            admitted[len(admitted)] = iteration
        values = order.claimed(Claimed.of(_claim(iteration, groups)), oldest_untrained=untrained[0])
        delays = [iteration - admitted[group] for group in groups]
        passed = [sum(other > group for other in trained) for group in groups]
        trained += groups
        assert values["trajectory/delay_mean"] == pytest.approx(np.mean(delays))
        assert values["trajectory/delay_max"] == max(delays)
        assert values["trajectory/bypasses_max"] == max(passed)
        assert values["trajectory/bypasses_mean"] == pytest.approx(np.mean(passed))


def test_lengths_in_order_wait_for_the_oldest_untrained_group() -> None:
    order = AdmissionOrder()
    order.admitted(range(3), iteration=1)
    young, old = _claim(1, [1]), _claim(2, [0])
    assert order.claimed(Claimed.of(young), oldest_untrained=0)["trajectory/length_in_order_mean"] is None
    lengths = np.concatenate([episode_lengths(young), episode_lengths(old)])
    found = order.claimed(Claimed.of(old), oldest_untrained=2)["trajectory/length_in_order_mean"]
    assert found == pytest.approx(lengths.mean())


def test_deciles_follow_length() -> None:
    order, claim = AdmissionOrder(), _claim(4, list(range(10)))
    lengths = episode_lengths(claim).reshape(10, SIZE).sum(1)
    for group, length in enumerate(lengths):
        order.admitted([group], iteration=1 if length > np.median(lengths) else 4)
    found = order.claimed(Claimed.of(claim), oldest_untrained=None)["trajectory/delay_by_decile"]
    assert found[-1] == 3.0 and found[0] < 3.0


def test_what_was_admitted_before_it_began_is_left_out() -> None:
    order = AdmissionOrder()
    order.admitted([5], iteration=2)
    values = order.claimed(Claimed.of(_claim(3, [4, 5])), oldest_untrained=None)
    assert values["trajectory/delay_mean"] == 1 and values["trajectory/bypasses_max"] == 0
    assert order.claimed(Claimed.of(_claim(4, [3])), oldest_untrained=None)["trajectory/delay_mean"] is None
