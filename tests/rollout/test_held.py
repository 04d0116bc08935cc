"""A held trajectory: what ends it, and what it sends."""

from __future__ import annotations

import numpy as np

from pmdflow.config.schema import EnvironmentConfig
from pmdflow.data.sampling import SamplingControl
from pmdflow.environments.host import Hosts
from pmdflow.environments.observed import Speech
from pmdflow.environments.protocol import Observation
from pmdflow.rollout.engine import Output
from pmdflow.rollout.held import FLUSH_TOKENS, HeldTrajectory
from pmdflow.rollout.session import Session
from pmdflow.types import Lease, StopReason
from tests.support.environments import tokenizer, tokens_of

WAIT_S = 30.0


class Says:
    """Begins without a word and answers every turn the same."""

    def __init__(self, answer: Observation) -> None:
        self.answer = answer

    def reset(self, **_: object) -> Observation:
        return Observation()

    def step(self, **_: object) -> Observation:
        return self.answer


def make_held(*, max_tokens: int, answer: Observation) -> HeldTrajectory:
    """One that generates, with a grant of 9, and whose environment has begun."""
    lease = Lease(
        trajectory=7, group=0, epoch=1, kind="train", metadata={}, text="", prompt=np.array([5], np.int32),
        prefix=np.zeros(0, np.int32), prefix_observed=np.zeros(0, np.uint8), max_tokens=max_tokens, grant=9,
    )  # fmt: skip
    control = SamplingControl(temperature=1.0, max_tokens=max_tokens)
    held = HeldTrajectory(lease=lease, control=control, limit=9, context=[])
    config = EnvironmentConfig(factory="a:b", timeout_s=WAIT_S)
    session = Session(
        make=lambda: Says(answer), hosts=Hosts(), speech=Speech(tokenizer=tokenizer), config=config, key="run/7",
        prompt="", metadata={}, said=None, turns=[],
    )  # fmt: skip
    held.open(session, unanswered=0, whole=False)
    assert held.phase == "calling"
    wait_answer(held)
    assert held.phase == "waiting"
    held.begin()
    return held


def wait_answer(held: HeldTrajectory) -> None:
    assert held.call is not None
    held.call.result(timeout=WAIT_S)
    assert held.poll() is not None


def test_an_answer_that_is_too_long_is_cut_and_ends_the_trajectory() -> None:
    held = make_held(max_tokens=5, answer=Observation(text="1 + 1 + 1"))
    held.take(Output(id=7, tokens=(11, 12, 13), logprobs=(-1.0, -1.0, -1.0), stop="stop"), version=0)
    assert (held.phase, held.stop, held.urgent) == ("ended", None, True)
    held.resume(grant=9)
    assert held.phase == "ended", "nobody may answer what is not durable"
    first = held.segment(version=2, next_version=2)
    assert (first.observed, first.tokens.tolist(), held.urgent) == (False, [11, 12, 13], False)
    held.resume(grant=9)
    wait_answer(held)
    assert (held.phase, held.stop) == ("over", "length")
    second = held.segment(version=3, next_version=3)
    cut = list(tokens_of("1 + 1 + 1")[:2])
    assert (second.observed, second.tokens.tolist(), second.offset, second.stop) == (True, cut, 3, "length")
    assert held.phase == "closed"


def test_a_last_turn_without_room_for_an_answer_ends_the_trajectory() -> None:
    held = make_held(max_tokens=2, answer=Observation(text="1"))
    held.take(Output(id=7, tokens=(11, 12), logprobs=(-1.0, -1.0), stop="stop"), version=0)
    assert (held.phase, held.stop) == ("over", "stop")


def test_an_end_without_words_is_sent_before_the_trajectory_is_let_go() -> None:
    held = make_held(max_tokens=9, answer=Observation(done=True))
    held.take(Output(id=7, tokens=(11,), logprobs=(-1.0,), stop="stop"), version=0)
    held.segment(version=0, next_version=0)
    held.resume(grant=9)
    wait_answer(held)
    assert (held.phase, held.stop) == ("over", "stop")
    assert held.segment(version=0, next_version=0).stop == "stop" and held.phase == "closed"


def test_an_answer_goes_on_only_once_it_is_durable() -> None:
    held = make_held(max_tokens=99, answer=Observation(text="1"))
    held.take(Output(id=7, tokens=(11,), logprobs=(-1.0,), stop="stop"), version=0)
    held.segment(version=0, next_version=0)
    held.resume(grant=9)
    wait_answer(held)
    assert held.phase == "answered" and held.urgent
    held.resume(grant=9)
    assert held.phase == "answered"
    held.segment(version=0, next_version=0)
    held.resume(grant=4)
    assert (held.phase, held.limit) == ("waiting", 4)


def test_without_a_grant_it_is_given_back_once_everything_is_sent() -> None:
    held = make_held(max_tokens=99, answer=Observation(text="1"))
    held.take(Output(id=7, tokens=(11, 12), logprobs=(-1.0, -1.0), stop=None), version=0)
    held.resume(grant=2)
    assert (held.phase, held.limit) == ("generating", 0), "what is unsent has used up the grant, and may bring another"
    assert held.segment(version=0, next_version=0).stop is None
    held.resume(grant=0)
    assert (held.phase, held.stop) == ("over", "budget")
    held.abort()
    assert held.segment(version=0, next_version=0).stop == "budget"


def test_many_tokens_an_end_and_a_used_up_grant_are_sent_at_once_and_little_is_not() -> None:
    def after(count: int, *, grant: int, stop: StopReason | None = None) -> bool:
        held = make_held(max_tokens=999, answer=Observation())
        held.resume(grant=grant)
        held.take(Output(id=7, tokens=(11,) * count, logprobs=(-1.0,) * count, stop=stop), version=0)
        return held.urgent

    assert [after(count, grant=900) for count in (1, FLUSH_TOKENS - 1, FLUSH_TOKENS)] == [False, False, True]
    assert [after(count, grant=40) for count in (1, 19, 20, 40)] == [False, False, True, True], "half of the grant"
    assert [after(count, grant=999) for count in (1, 63)] == [False, False]
    assert after(3, grant=999, stop="length")
