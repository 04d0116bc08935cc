"""Every policy over random histories of the real store, and how rollout actors are divided among versions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.errors import PmdflowError
from pmdflow.run.policies import POLICIES, Decision, Policy, asynchronous, policy_of, synchronous
from pmdflow.run.scheduler import SchedulerSettings, assign_versions, decide, next_quota, serve
from pmdflow.run.simulation.check import check_command, check_policy
from pmdflow.store.facade import TrajectoryStore
from pmdflow.types import Counts

SETTINGS = SchedulerSettings(groups_per_iteration=4, tokens_per_iteration=100, tokens_per_segment=None, lookahead=0)
EMPTY = Counts(**dict.fromkeys(Counts.__slots__, 0))


def never_a_group(settings: SchedulerSettings, counts: Counts) -> Decision:
    return replace(synchronous(settings, counts), groups=0)


def raises(settings: SchedulerSettings, counts: Counts) -> Decision:
    if counts.version >= 2:
        raise KeyError("third version")
    return asynchronous(settings, counts)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_every_policy_keeps_its_bounds_and_ends(policy: Policy) -> None:
    failure = check_policy(policy, examples=60)
    assert failure is None, failure


@pytest.mark.nightly
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_every_policy_keeps_its_bounds_and_ends_in_the_long_form(policy: Policy) -> None:
    failure = check_policy(policy, examples=20_000 // len(POLICIES), seed=1)
    assert failure is None, failure


def test_a_policy_that_breaks_a_rule_is_named_with_a_short_history() -> None:
    with pytest.raises(PmdflowError, match=r"never_a_group says groups = 0: it must be a whole number of 1 to "):
        check_command("tests.run.test_policies:never_a_group", examples=5, seed=0)
    answer = CliRunner().invoke(app, ["check-policy", "tests.run.test_policies:raises", "--examples", "50"])
    said = str(answer.exception)
    assert "test_policies:raises raised KeyError: 'third version' (test_policies.py:" in said
    assert "version 1, " in said and "group_size" not in said, "the history is not short"
    with pytest.raises(PmdflowError, match="cannot be imported"):
        check_command("tests.run.test_policies:nothing", examples=1, seed=0)
    fine = CliRunner().invoke(app, ["check-policy", "pmdflow.run.policies:dora", "--examples", "3"])
    assert fine.exit_code == 0 and "3 histories keep every bound" in fine.output


@pytest.mark.parametrize(
    ("numbers", "name", "groups"),
    [
        ({}, "synchronous", 4),
        ({"tokens_per_segment": 8}, "k15", 4),
        ({"extra_groups": 3}, "over_provisioned", 7),
        ({"lookahead": 2}, "asynchronous", 12),
        ({"lookahead": 2, "versions": 3}, "dora", 12),
    ],
)
def test_the_numbers_say_which_policy_it_is(numbers: dict[str, int], name: str, groups: int) -> None:
    settings = replace(SETTINGS, **numbers)  # type: ignore[arg-type]
    assert policy_of(settings).__name__ == name
    decision = decide(settings, EMPTY)
    assert (decision.groups, decision.tokens) == (groups, 100)
    assert decision.tokens_per_segment == settings.tokens_per_segment and decision.versions == settings.versions


def test_versions_go_with_the_setting_that_the_store_has() -> None:
    def own(settings: SchedulerSettings, counts: Counts) -> Decision:
        return replace(asynchronous(settings, counts), versions=3)

    with pytest.raises(PmdflowError, match=r"scheduler\.versions is None"):
        decide(replace(SETTINGS, policy=own), EMPTY)
    assert decide(replace(SETTINGS, policy=own, lookahead=1, versions=2), EMPTY).versions == 2
    assert decide(replace(SETTINGS, policy=own, lookahead=1, versions=9), EMPTY).versions == 3


@pytest.mark.parametrize(
    "numbers",
    [
        {"groups": 2.5},
        {"groups": "3"},
        {"tokens": float("nan")},
        {"tokens": None},
        {"tokens": 2**70},
        {"tokens_per_segment": 2**31},
        {"priority": 1.5},
        {"priority": 2**31},
    ],
)
def test_numbers_that_the_store_cannot_hold_are_told_by_the_name_of_the_policy(numbers: dict[str, object]) -> None:
    def own(settings: SchedulerSettings, counts: Counts) -> Decision:
        return replace(synchronous(settings, counts), **numbers)  # type: ignore[arg-type]

    with pytest.raises(
        PmdflowError, match=rf"<locals>\.own says {next(iter(numbers))} = .*: it must be a whole number"
    ):
        decide(replace(SETTINGS, policy=own), EMPTY)


def test_what_a_policy_raises_is_told_by_its_name() -> None:
    with pytest.raises(
        PmdflowError, match=r"test_policies:raises raised KeyError: 'third version' \(test_policies\.py:"
    ):
        decide(replace(SETTINGS, policy=raises), replace(EMPTY, version=2))


def test_a_segment_budget_that_is_granted_very_often_stays_one_that_the_store_can_hold() -> None:
    settings = replace(SETTINGS, tokens_per_segment=1_000_000)
    counts = replace(EMPTY, tokens_budget=SETTINGS.tokens_per_iteration * 10_000)
    quota = next_quota(settings, counts)
    store = TrajectoryStore(None, groups_per_iteration=4, lookahead=0, max_staleness=None)
    store.publish(0, None, {})
    store.set_quota(quota)


REQUESTS = st.dictionaries(st.integers(0, 30), st.integers(0, 500), max_size=6)


@given(REQUESTS, st.integers(0, 20))
def test_the_shares_of_versions_add_up_and_none_is_empty(requests: dict[int, int], workers: int) -> None:
    seats = assign_versions(requests, workers)
    live = sorted(version for version, number in requests.items() if number)
    assert sum(seats.values()) == (workers if live else 0)
    if workers >= len(live):
        assert list(seats) == live and all(number >= 1 for number in seats.values())
        whole = sum(requests.values())
        for version in live:  # the quota rule of largest remainders, but for what was given to keep one each
            least = workers * requests[version] // whole
            assert seats[version] >= min(least, 1) and seats[version] <= max(least, 0) + 1
    else:
        assert list(seats) == live[:workers]


@given(REQUESTS, st.lists(st.integers(0, 30), max_size=12))
def test_as_few_as_possible_move(requests: dict[int, int], versions: list[int]) -> None:
    workers = {f"rollout-{number}": version for number, version in enumerate(versions)}
    assigned = assign_versions(requests, workers)
    seats = assign_versions(requests, len(workers))
    assert list(assigned) == list(workers)
    if not seats:
        assert assigned == workers
        return
    assert {version: list(assigned.values()).count(version) for version in seats} == seats
    kept = sum(min(versions.count(version), number) for version, number in seats.items())
    assert sum(assigned[name] == workers[name] for name in workers) == kept


def test_ties_go_to_the_newest_version_and_too_few_actors_to_the_oldest() -> None:
    assert assign_versions({3: 1, 4: 1}, 3) == {3: 1, 4: 2}
    assert assign_versions({1: 10, 2: 20, 3: 70}, 8) == {1: 1, 2: 1, 3: 6}
    assert assign_versions({1: 1, 2: 1, 9: 500}, 8) == {1: 1, 2: 1, 9: 6}
    assert assign_versions({7: 5, 8: 900, 9: 900}, 2) == {7: 1, 8: 1}
    assert assign_versions({7: 5, 8: 900}, {"only": 8}) == {"only": 7}
    with pytest.raises(ValueError, match="must not be negative"):
        assign_versions({7: -1}, 2)


def test_the_newest_version_has_the_slots_that_older_ones_leave() -> None:
    serving = {"a": 4, "b": 4, "c": 4, "d": 4}
    assert serve({4: 8, 5: 100}, serving, newest=5, slots=4) == {"a": 4, "b": 4, "c": 5, "d": 5}
    assert serve({4: 16, 5: 100}, serving, newest=5, slots=4) == {"a": 4, "b": 4, "c": 4, "d": 5}
    assert serve({5: 1}, serving, newest=5, slots=4) == dict.fromkeys(serving, 5)
    assert serve({}, serving, newest=5, slots=4) == serving
