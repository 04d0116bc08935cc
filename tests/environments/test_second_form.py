"""What an environment may be: one that resumes, a coroutine, one that hangs; what it may say; and that it is closed."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from typing import Any, ClassVar

import pytest

from pmdflow.config.schema import EnvironmentConfig
from pmdflow.environments.host import Hosts
from pmdflow.environments.observed import Speech
from pmdflow.environments.protocol import Environment, Note, Observation, PastTurn, Reply
from pmdflow.rollout.session import Session
from pmdflow.rollout.turns import Turn
from tests.support.environments import tokenizer, tokens_of

WAIT_S = 30.0
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Remembers:
    """Says how many turns it has seen; can resume."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.closed = threading.Event()
        self.threads: set[int] = set()

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        self.calls.append(("reset", key))
        return Observation(text="0", key="start")

    def step(self, *, key: str, action: str) -> Observation:
        self.calls.append(("step", key))
        self.threads.add(threading.get_ident())
        return self.answer(action)

    def answer(self, action: str) -> Observation:
        return Observation(text=f"{len(self.calls)}", reward=0.5, metrics={"m": 2.0}, done=action == "7")

    def resume(self, *, key: str, prompt: str, metadata: Mapping[str, Any], turns: Sequence[PastTurn]) -> None:
        self.calls.append(("resume", key, [(turn.key, turn.action, turn.observation) for turn in turns]))

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed.set()


def make_session(
    environment: Callable[[], Any] | Environment, *, timeout_s: float = 20.0, max_turns: int | None = None,
    speech: Speech | None = None, hosts: Hosts | None = None, **others: Any,
) -> Session:  # fmt: skip
    return Session(
        make=environment if callable(environment) else lambda: environment,
        hosts=hosts or Hosts(),
        speech=speech or Speech(tokenizer=tokenizer),
        config=EnvironmentConfig(factory="a:b", timeout_s=timeout_s, failure=" = ?\n", max_turns=max_turns),
        key="run/7",
        prompt="1 + 1 =",
        metadata={},
        **{"said": None, "turns": [], **others},
    )


def turn(session: Session, action: str | None) -> Reply:
    """Its answer, or that its time is over."""
    session.start(None if action is None else tokens_of(action))
    assert session.call is not None
    while (reply := session.poll()) is None:
        wait([session.call], timeout=0.01)
    return reply


def test_one_that_resumes_is_given_the_record_and_called_no_second_time() -> None:
    turns = [
        Turn(action=tokens_of("3"), observed=tokens_of("1")),
        Turn(action=tokens_of("9"), observed=tokens_of(" = ?\n")),
        Turn(action=tokens_of("4"), observed=tokens_of("2")),
    ]
    environment = Remembers()
    session = make_session(environment, said=tokens_of("0"), turns=turns, num_notes=5)
    reply = turn(session, "5")
    past = [("run/7/1", "3", "1"), ("run/7/3", "4", "2")]
    assert environment.calls == [("resume", "run/7/0", past), ("step", "run/7/4")]
    assert reply == Reply(tokens=tokens_of("2"), note=Note(number=5, rewards={"m": 2.0, "reward": 0.5}))


def test_what_was_said_before_the_worker_vanished_stands() -> None:
    session = make_session(Remembers(), said=tokens_of("0"), num_notes=2, is_noted=True)
    assert turn(session, "5").note is None
    note = turn(session, "5").note
    assert note is not None and note.number == 2


def test_it_is_closed_by_its_own_thread_when_its_lease_ends() -> None:
    environment, hosts = Remembers(), Hosts()
    session = make_session(environment, hosts=hosts)
    assert turn(session, None).note == Note(number=0, rewards={}, key="start")
    turn(session, "3")
    session.close("its lease has ended")
    session.close("twice")
    assert environment.closed.wait(WAIT_S)
    assert hosts.close(timeout_s=WAIT_S) == [] and len(environment.threads) == 1


class Waits(Remembers):
    """A coroutine that waits for ever at 8, and lives in a loop of its own."""

    loops: ClassVar[set[asyncio.AbstractEventLoop]] = set()
    cancelled = threading.Event()

    async def step(self, *, key: str, action: str) -> Observation:  # type: ignore[override]
        self.loops.add(asyncio.get_running_loop())
        if action == "8":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        await asyncio.sleep(0)
        return Observation(text="late" if action == "8" else action)

    async def close(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.closed.set()


def test_a_coroutine_that_hangs_is_cancelled_closed_and_named_and_the_next_call_gets_another() -> None:
    made: list[Waits] = []
    session = make_session(lambda: made.append(Waits()) or made[-1], timeout_s=0.3)
    turn(session, None)
    assert turn(session, "3").tokens == tokens_of("3")
    late = turn(session, "8")
    assert late.tokens == tokens_of(" = ?\n")
    assert late.problem == "run/7: turn 2 was not answered: no answer within 0.3 s"
    assert made[0].closed.wait(WAIT_S) and Waits.cancelled.is_set()
    assert turn(session, "4").tokens == tokens_of("4")
    assert [call[0] for call in made[1].calls] == ["resume"]
    assert len(Waits.loops) == 2, "each has a loop of its own"
    session.close("")
    assert made[1].closed.wait(WAIT_S)


class Stuck(Remembers):
    """Its thread cannot be interrupted."""

    released = threading.Event()

    def answer(self, action: str) -> Observation:
        self.released.wait(WAIT_S)
        return Observation(text="late")


def test_a_thread_that_hangs_is_given_up_named_at_the_end_and_closed_when_it_returns() -> None:
    environment, hosts = Stuck(), Hosts()
    session = make_session(environment, timeout_s=0.2, hosts=hosts)
    turn(session, None)
    assert "within 0.2 s" in turn(session, "3").problem
    session.close("")
    assert hosts.close(timeout_s=0.1) == ["run/7"] and not environment.closed.is_set()
    Stuck.released.set()
    assert environment.closed.wait(WAIT_S) and hosts.close(timeout_s=WAIT_S) == []


class Leaves(Remembers):
    """Wants to end the process."""

    def reset(self, **_: Any) -> Observation:
        raise SystemExit(3)


class Exits(Remembers):
    """What it starts ends its loop."""

    async def step(self, *, key: str, action: str) -> Observation:  # type: ignore[override]
        async def leave() -> None:
            raise SystemExit(3)

        task = asyncio.create_task(leave())
        await asyncio.wait([task])
        return Observation(text=action)


def test_one_whose_loop_has_ended_is_late_and_closed_as_any_other() -> None:
    session = make_session(Exits(), timeout_s=0.3)
    turn(session, None)
    assert "no answer within" in turn(session, "3").problem


def test_one_that_fails_to_begin_is_closed_too() -> None:
    environment, hosts = Leaves(), Hosts()
    session = make_session(environment, hosts=hosts)
    reply = turn(session, None)
    assert reply.done and "the trajectory ends: SystemExit: 3" in reply.problem
    session.close("")
    assert environment.closed.wait(WAIT_S) and hosts.close(timeout_s=WAIT_S) == []


def test_too_many_turns_end_the_episode_by_name() -> None:
    session = make_session(Remembers(), max_turns=2)
    turn(session, None)
    assert not turn(session, "3").done
    last = turn(session, "3")
    assert last.done and last.tokens and last.note is not None
    assert last.notice == "run/7: the trajectory ends after 2 turns (environment.max_turns)" and not last.problem


class Says(Remembers):
    """Says what it is told to."""

    says: Any = None

    def answer(self, action: str) -> Observation:
        return self.says


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (None, "AttributeError"),
        (Observation(text="a", tokens=[5]), "text and tokens: give one"),
        (Observation(tokens=[99999]), "token 99999"),
        (Observation(messages=[{"role": "user", "content": "go"}]), "no chat template"),
        (Observation(text="a", reward=float("nan")), "'reward': nan"),
        (Observation(text="a", metrics={"m": "x"}), "'m': 'x'"),  # type: ignore[dict-item]
        (Observation(text="a", metrics={"reward": 1.0}), "give it as its reward"),
        (Observation(text="a", metrics={"\ud800": 1.0}), "half a character"),
        (Observation(text="a", key=5), "a key is a text"),  # type: ignore[arg-type]
        (Observation(), "says nothing"),
    ],
)
def test_what_cannot_be_said_is_a_failed_call_and_named(says: Any, words: str) -> None:
    environment = Says()
    environment.says = says
    session = make_session(environment)
    turn(session, None)
    reply = turn(session, "3")
    assert reply.tokens == tokens_of(" = ?\n") and words in reply.problem and reply.note is None


def test_token_ids_are_appended_as_they_are() -> None:
    environment = Says()
    environment.says = Observation(tokens=[11, 12])
    session = make_session(environment)
    turn(session, None)
    assert turn(session, "3").tokens == (11, 12)


def test_messages_follow_the_models_turn_as_its_template_says() -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    environment = Says()
    environment.says = Observation(messages=[{"role": "tool", "content": "42"}])
    session = make_session(environment, speech=Speech(tokenizer=chat))
    turn(session, None)
    assert turn(session, "3").tokens == tokens_of("<eos><tool>42<eos><assistant>")
    assert turn(session, "3<eos>").tokens == tokens_of("<tool>42<eos><assistant>"), "its end is not said twice"
    chat.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}")
    assert "does not append these messages" in turn(session, "3").problem


class Wants(Remembers):
    """Asks for the ids and the special tokens of a turn."""

    def step(self, *, key: str, raw: str, tokens: tuple[int, ...]) -> Observation:  # type: ignore[override]
        return Observation(text=f"{raw} {list(tokens)}")


def test_step_is_given_what_it_has_parameters_for() -> None:
    session = make_session(Wants())
    turn(session, None)
    ids = tokens_of("3<eos>")
    assert turn(session, "3<eos>").tokens == tokens_of(f"3<eos> {list(ids)}")
