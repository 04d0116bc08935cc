"""Turns of a trajectory: its record, and replay, deadlines and keys of environments."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.config.schema import EnvironmentConfig
from pmdflow.environments.host import Hosts
from pmdflow.environments.observed import Speech
from pmdflow.environments.protocol import Observation, Reply
from pmdflow.rollout.session import Session
from pmdflow.rollout.turns import Turn, split_turns
from tests.support.environments import Echo, tokenizer, tokens_of

WAIT_S = 30.0
ids = st.integers(2, 300)


def make_session(environment: Any, *, said: tuple[int, ...] | None = None, timeout_s: float = 20.0) -> Session:
    return Session(
        make=lambda: environment,
        hosts=Hosts(),
        speech=Speech(tokenizer=tokenizer),
        config=EnvironmentConfig(factory="a:b", timeout_s=timeout_s, failure=" = ?\n"),
        key="run/7",
        prompt="1 + 1 =",
        metadata={"answer": "2"},
        said=said,
        turns=[],
    )


def answer_of(session: Session) -> Reply:
    assert session.call is not None
    wait([session.call], timeout=min(WAIT_S, session.config.timeout_s * (2 + len(session.turns)) + 0.01))
    reply = session.poll()
    assert reply is not None
    return reply


@given(first=st.lists(ids, max_size=3), turns=st.lists(st.tuples(st.lists(ids, min_size=1), st.lists(ids, min_size=1))))
def test_the_record_splits_into_its_turns(first: list[int], turns: list[tuple[list[int], list[int]]]) -> None:
    tokens = np.array([*first, *(t for a, o in turns for t in [*a, *o])], np.int32)
    flags = [1] * len(first) + [f for a, o in turns for f in [0] * len(a) + [1] * len(o)]
    said, found = split_turns(tokens, np.array(flags, np.uint8))
    assert said == tuple(first)
    assert found == [Turn(action=tuple(a), observed=tuple(o)) for a, o in turns]


def test_calls_have_keys_of_their_own_and_a_replay_repeats_them() -> None:
    keys: list[str] = []
    session = make_session(Echo(keys))
    session.start(None)
    assert answer_of(session) == Reply(tokens=tokens_of("1 + 1 = 2"))
    session.start(tokens_of("3"))
    assert answer_of(session).tokens == tokens_of("3: 1")
    assert keys == ["run/7/0", "run/7/1"]
    again: list[str] = []
    later = make_session(Echo(again), said=session.said)
    later.turns = list(session.turns)
    later.start(tokens_of("7"))
    assert answer_of(later) == Reply(tokens=tokens_of("7: 2"), done=True)
    assert again == ["run/7/0", "run/7/1", "run/7/2"]


def test_an_environment_that_answers_otherwise_ends_the_trajectory() -> None:
    session = make_session(Echo([]), said=tokens_of("1 + 1 = 2"))
    session.turns = [Turn(action=tokens_of("3"), observed=tokens_of("3: 5"))]
    session.start(tokens_of("4"))
    reply = answer_of(session)
    assert reply.done and not reply.tokens
    assert "run/7" in reply.problem and "'3: 5' before" in reply.problem and "'3: 1'" in reply.problem


def test_a_failing_call_is_read_by_the_model_and_passed_over_in_a_replay() -> None:
    session = make_session(Echo([]), said=tokens_of("1 + 1 = 2"))
    session.start(tokens_of("9"))
    reply = answer_of(session)
    assert reply.tokens == tokens_of(" = ?\n") and not reply.done and "no such digit" in reply.problem
    keys: list[str] = []
    later = make_session(Echo(keys), said=session.said)
    later.turns = list(session.turns)
    later.start(tokens_of("3"))
    assert answer_of(later).tokens == tokens_of("3: 1")
    assert keys == ["run/7/0", "run/7/2"]


class Slow(Echo):
    """Does not answer `8` until it is let go."""

    released = threading.Event()

    def step(self, *, key: str, action: str) -> Observation:
        if action == "8":
            self.released.wait(timeout=WAIT_S)
        return super().step(key=key, action=action)


def test_a_slow_call_has_a_deadline_and_holds_up_nobody() -> None:
    slow, other = make_session(Slow([]), timeout_s=0.05), make_session(Echo([]))
    slow.make = lambda: Slow([])
    slow.start(None)
    answer_of(slow)
    slow.start(tokens_of("8"))
    other.start(None)
    assert answer_of(other).tokens == tokens_of("1 + 1 = 2")
    reply = answer_of(slow)
    assert reply.tokens == tokens_of(" = ?\n") and "within 0.05 s" in reply.problem
    slow.config = slow.config.model_copy(update={"timeout_s": 20.0})
    slow.start(tokens_of("3"))
    assert answer_of(slow).tokens == tokens_of("3: 1")
    Slow.released.set()
