"""Rates of success: moved once by each claim, by all that was settled before it, and lost by no crash or undoing."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.store import TrajectoryStore
from pmdflow.types import Drawn
from tests.support.filled_store import PROMPT, open_store, quota, segment

DECAY, SUCCESS = 0.5, 1.0
OPTIONS = {"groups_per_iteration": 2, "signal": (0.0, 1.0), "successes": (DECAY, SUCCESS), "min_group_size": 1}


@dataclass
class Model:
    """What the rates are by their definition."""

    rates: dict[int, float] = field(default_factory=dict)
    settled: list[tuple[int, float]] = field(default_factory=list)
    """Evicted without a signal since the last claim."""
    number: int = 0

    def claim(self, seen: list[tuple[int, float]], iteration: int) -> None:
        for key, success in [*self.settled, *seen]:
            old = self.rates.get(key)
            self.rates[key] = success if old is None else DECAY * old + (1 - DECAY) * success
        self.settled, self.number = [], max(iteration, self.number + 1)


def rates_of(store: TrajectoryStore, after: int | None = None) -> tuple[int, dict[int, float]]:
    found = store.successes(after)
    return found.number, dict(zip(found.keys.tolist(), found.rates.tolist(), strict=True))


def admit(store: TrajectoryStore, number: int, key: int | None, at: int) -> int:
    drawn = None if key is None else Drawn(key=key, number=at)
    return store.admit(f"train-{number}", replace(PROMPT, drawn=drawn), group_size=2, max_tokens=6, cursor=number)


def answer(store: TrajectoryStore, group: int, rewards: list[float]) -> None:
    leases = store.lease_group("worker", group)
    store.append([segment(lease, 3, stop="stop") for lease in leases])
    by_trajectory = dict(zip([lease.trajectory for lease in leases], rewards, strict=True))
    for item in store.unscored(100, 0.0, 0.0):
        store.score(item.trajectory, item.attempt, "scored", by_trajectory[item.trajectory], {})


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("answer"),
            st.one_of(st.none(), st.integers(0, 3)),
            st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=2),
        ),
        st.tuples(st.just("train")),
        st.tuples(st.just("undo")),
        st.tuples(st.just("reopen")),
    ),
    max_size=30,
)


@given(steps=steps)
def test_rates_are_those_of_the_definition(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder), **OPTIONS)
        store.publish(0)
        store.set_quota(quota(0))
        model, ready, undone = Model(), [], []
        admitted = version = iteration = committed = 0
        claims: list[list[tuple[int, float]]] = []
        for step in steps:
            if step[0] == "answer":
                key, rewards = step[1], step[2]
                answer(store, admit(store, admitted, key, model.number), rewards)
                admitted += 1
                success = sum(reward >= SUCCESS for reward in rewards) / 2
                if not 0.0 < sum(rewards) / 2 < 1.0:
                    model.settled += [] if key is None else [(key, success)]
                else:
                    ready.append((key, success))
            elif step[0] == "train":
                claim = store.claim(iteration + 1, version, 0.0)
                if claim.status == "starved" and claim.reason == "no_signal":
                    claim = store.claim(iteration + 1, version, 0.0)
                if claim.status != "claimed":
                    continue
                iteration += 1
                if undone:
                    claims.append(undone.pop(0))
                else:
                    seen, ready = ready[: len(claim.groups)], ready[len(claim.groups) :]
                    model.claim([(key, success) for key, success in seen if key is not None], iteration)
                    claims.append(seen)
                version += 1
                store.publish(version, iteration, {})
                store.set_quota(quota(version))
            elif step[0] == "undo":
                store.uncommit(committed)
                undone, claims, iteration = claims[committed:] + undone, claims[:committed], committed
            else:
                store.close()
                store = open_store(Path(folder), **OPTIONS)
            assert rates_of(store) == (model.number, model.rates)
        store.close()


def test_what_a_claim_moved_is_told_alone_to_whoever_has_the_rates_before_it() -> None:
    store = open_store(**OPTIONS)
    store.publish(0)
    store.set_quota(quota(0))
    for number, key in enumerate([5, 6, 5, 7]):
        answer(store, admit(store, number, key, 0), [0.0, 1.0])
    for iteration in (1, 2):
        assert store.claim(iteration, iteration - 1, 0.0).status == "claimed"
        store.publish(iteration, iteration, {})
        store.set_quota(quota(iteration))
    everything = {5: 0.5, 6: 0.5, 7: 0.5}
    assert rates_of(store) == (2, everything)
    assert rates_of(store, 2) == (2, {})
    assert rates_of(store, 1) == (2, {5: 0.5, 7: 0.5})
    assert rates_of(store, 0) == (2, everything)


@pytest.mark.parametrize("given", [(1.0, 1.0), (-0.1, 1.0), (0.5, float("nan"))])
def test_an_average_that_cannot_be_meant_is_refused(given: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="the decay is at least 0 and below 1, the reward finite"):
        open_store(successes=given)
