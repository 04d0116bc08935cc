"""The conversation of one program, through a real engine and store: what a client is told, and what the store holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pmdflow.agents.desk import Incoming, Outgoing
from pmdflow.agents.requests import Posted, parse_turn
from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.data.prompts import make_prompts
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.rollout.programs import AgentsPlace, Programs
from pmdflow.store import TrajectoryStore
from pmdflow.types import Quota
from tests.support.chat_model import FORGETFUL, chat_model
from tests.support.engine import make_engine
from tests.support.paths import ROOT

ASK = {"role": "user", "content": "1 + 2"}
MAX_TOKENS = 300


class Quiet:
    """A program that the test speaks for."""

    def __init__(self) -> None:
        self.ended: Future[str] = Future()
        self.rewards: dict[str, float] = {}
        self.killed = self.died = False

    def kill(self) -> None:
        self.killed = True


class Life:
    """One rollout actor without Ray, from its lease to its death, and one program."""

    def __init__(self, store: TrajectoryStore, engine: TransformersEngine, config: Config, name: str) -> None:
        self.store, self.engine, self.program = store, engine, Quiet()
        self.programs = Programs(config, AgentsPlace(address="", secret=b""), Path(), name, store.trajectory)
        self.programs._start = lambda lease: self.program  # type: ignore[method-assign, assignment, return-value]
        self.holder = Holder(engine, LeaseTaker(config, self.programs))
        self.name, self.answers, self.notes, self._number = name, dict[str, Outgoing](), list[tuple[str, str]](), 0
        self.gone: list[HeldTrajectory] = []
        self.epoch = 0
        self.lease(new=True)

    def lease(self, *, new: bool = False) -> None:
        (lease,) = self.store.lease(self.name, 0, 1, 5.0)
        self.epoch = lease.epoch if new else self.epoch
        self.holder.join(lease, grant=lease.grant)
        self.id = lease.trajectory

    def send(self, body: Any, *, chat: bool = True, **how: Any) -> str:
        self._number += 1
        id = f"{self.name}.{self._number}"
        content = body if isinstance(body, Posted) else parse_turn(body, chat=chat, **how)
        self.programs.desk.submit([Incoming(id=id, trajectory=self.id, epoch=self.epoch, content=content)])
        return id

    def step(self) -> None:
        self.holder.fill_slots()
        if self.engine.active():
            self.holder.step()
        for id, reply in self.holder.take_answers().items():
            if reply.done:
                held = self.holder[id]
                self.programs.note(held, reply.problem)
                if rewards := self.programs.rewards(held):
                    self.store.turn(id, held.epoch, 0, rewards)
        for held in self.holder.forks():
            assert held.fork is not None
            held.forked(self.store.fork(held.id, held.epoch, held.fork).epoch)
        for held in self.holder.resume(self.store.append(self.holder.segments(next_version=0))[1]):
            self.notes += self.programs.let_go(held, stays=True)
            self.gone.append(held)
        self.answers |= {answer.id: answer for answer in self.programs.desk.take_answers(0.0)}

    def wait(self, id: str) -> Outgoing:
        for _ in range(2000):
            if id in self.answers:
                return self.answers[id]
            self.step()
        raise AssertionError(f"{id} is not answered")

    def ask(self, *messages: Any, **others: Any) -> dict[str, Any]:
        answer = self.wait(self.send({"messages": list(messages), "max_tokens": 8, **others}))
        assert answer.status == 200, answer
        return dict(answer.body)

    def end(self, problem: str = "") -> None:
        self.program.ended.set_result(problem)
        for _ in range(50):
            self.step()
        assert len(self.holder) == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"": chat_model(folder / "model"), "forgetful": chat_model(folder / "forgetful", FORGETFUL)}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> TransformersEngine:
    torch.set_num_threads(1)
    return make_engine(str(folders[""]))


class World:
    def __init__(self, tmp_path: Path, engine: TransformersEngine, model: Path, *options: str) -> None:
        settings = [f"model.path={model}", f"data.max_tokens={MAX_TOKENS}", "eval.prompts=2"]
        agents = ["agents.command=[agent]", *options]
        self.config = load(ROOT / "configs" / "quickstart.yaml", [*settings, *agents]).config
        self.engine, self.number = engine, 0
        self.store = TrajectoryStore(tmp_path / "store", groups_per_iteration=1, lookahead=9, max_staleness=None)
        self.store.publish(0)
        self.quota(1 << 20)
        prompt = make_prompts(self.config).prompt(0)
        assert len(prompt.tokens) == 1
        self.store.admit("r", prompt, group_size=1, max_tokens=MAX_TOKENS, cursor=0)

    def quota(self, tokens: int) -> None:
        self.store.set_quota(Quota(version=0, groups=9, tokens=tokens, tokens_per_segment=None))

    def life(self) -> Life:
        """Another actor takes the lease; the one before it is dead, with whatever it had not sent."""
        if self.number:
            self.store.fence(f"w{self.number}")
            for id in range(9):
                self.engine.abort(id)
        self.number += 1
        return Life(self.store, self.engine, self.config, f"w{self.number}")


@pytest.fixture
def world(tmp_path: Path, engine: TransformersEngine, folders: dict[str, Path]) -> Iterator[World]:
    world = World(tmp_path, engine, folders[""])
    yield world
    for id in range(9):
        engine.abort(id)
    world.store.close()


def generated_of(store: TrajectoryStore, id: int) -> int:
    return int((store.trajectory(id)["observed"] == 0).sum())


def answer_of(body: dict[str, Any]) -> dict[str, Any]:
    return dict(body["choices"][0]["message"])


def test_two_turns_and_the_end_of_the_program(world: World) -> None:
    life = world.life()
    first = life.ask(ASK, logprobs=True)
    second = life.ask(ASK, answer_of(first), {"role": "user", "content": "sure?"})
    assert first["choices"][0]["finish_reason"] in ("stop", "length")
    assert first["pmdflow"]["versions"] == [[[0, first["usage"]["completion_tokens"]]]]
    row = world.store.trajectory(life.id)
    generated = row["observed"] == 0
    assert generated.sum() == first["usage"]["completion_tokens"] + second["usage"]["completion_tokens"]
    assert second["usage"]["total_tokens"] == 1 + len(row["tokens"])
    told = [entry["logprob"] for entry in first["choices"][0]["logprobs"]["content"]]
    assert np.allclose(row["logprobs"][generated][: len(told)], told, atol=1e-6)
    life.end()
    row = world.store.trajectory(life.id)
    assert (row["state"], row["stop"].name, row["forks"]) == ("unscored", "STOP", [])
    assert life.notes == []
    assert life.program.killed


def test_a_retry_gets_the_same_answer_and_any_other_repeat_another_sample(world: World) -> None:
    life = world.life()
    first = life.ask(ASK)
    again = life.wait(life.send({"messages": [ASK], "max_tokens": 8}, retried=True)).body
    assert again == first
    samples = [life.ask(ASK) for _ in range(4)]
    assert len({sample["id"] for sample in [first, *samples]}) == 5
    assert len({json.dumps(answer_of(sample)) for sample in [first, *samples]}) > 1
    row = world.store.trajectory(life.id)
    assert len(row["forks"]) == 4
    assert generated_of(world.store, life.id) == sum(b["usage"]["completion_tokens"] for b in [first, *samples])
    life.end()
    assert life.notes == []  # a sample is no rewritten history


def test_requests_that_are_sent_again_while_the_first_is_open_join_it(world: World) -> None:
    life = world.life()
    ids = [life.send({"messages": [ASK], "max_tokens": 8}) for _ in range(3)]
    ids.append(life.send({"messages": [ASK], "max_tokens": 8}, idempotency_key="k"))
    bodies = [life.wait(id).body for id in ids]
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[3]["id"] != bodies[0]["id"]
    assert life.wait(life.send({"messages": [ASK], "max_tokens": 8}, idempotency_key="k")).body == bodies[3]


def test_n_samples_of_one_request_are_branches(world: World) -> None:
    body = world.life().ask(ASK, n=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    (trajectory,) = [found.trajectory for found in world.store.query()]
    assert len(world.store.trajectory(trajectory)["forks"]) == 2


def test_a_rewritten_history_is_a_branch_or_the_end(world: World, tmp_path: Path, folders: dict[str, Path]) -> None:
    life = world.life()
    life.ask(ASK)
    life.ask({"role": "user", "content": "another task"})
    assert len(world.store.trajectory(life.id)["forks"]) == 1
    life.end()
    assert life.notes == [("history_branched", "the program rewrote its history")]
    strict = World(tmp_path / "strict", world.engine, folders[""], "agents.history=strict")
    life = strict.life()
    life.ask(ASK)
    refused = life.wait(life.send({"messages": [{"role": "user", "content": "another task"}]}))
    assert refused.status == 410
    for _ in range(9):
        life.step()
    assert strict.store.trajectory(life.id)["state"] == "unscored"
    assert life.notes[0][0] == "history_ended"
    assert life.program.killed
    strict.store.close()


def test_a_template_that_forgets_is_named_at_the_turn_where_it_breaks(
    tmp_path: Path, engine: TransformersEngine, folders: dict[str, Path]
) -> None:
    world = World(tmp_path, engine, folders["forgetful"])
    life = world.life()
    first = life.ask(ASK)
    life.ask(ASK, answer_of(first), {"role": "user", "content": "?"})
    life.end()
    ((kind, why),) = life.notes
    assert kind == "history_branched"
    assert "the chat template says the earlier turns anew" in why
    world.store.close()


def test_who_is_started_again_is_answered_from_the_store_until_it_says_something_new(world: World) -> None:
    life = world.life()
    first = life.ask(ASK, logprobs=True)
    more = [ASK, answer_of(first), {"role": "user", "content": "sure?"}]
    second = life.ask(*more)
    sample = life.ask(*more)
    before = world.store.trajectory(life.id)
    life = world.life()
    assert [life.ask(ASK, logprobs=True), life.ask(*more), life.ask(*more)] == [first, second, sample]
    after = world.store.trajectory(life.id)
    assert after["tokens"].tobytes() == before["tokens"].tobytes()
    life.ask(*more, answer_of(sample), {"role": "user", "content": "really?"})
    assert world.store.trajectory(life.id)["forks"] == before["forks"]
    life.end()
    assert life.notes == []


@pytest.mark.parametrize("steps", range(1, 12))
def test_a_turn_goes_on_wherever_its_actor_died(world: World, steps: int) -> None:
    life = world.life()
    life.send({"messages": [ASK], "max_tokens": 8})
    for _ in range(steps):
        life.step()
    before = world.store.trajectory(life.id)
    life = world.life()
    body = life.ask(ASK)
    after = world.store.trajectory(life.id)
    assert after["tokens"][: len(before["tokens"])].tobytes() == before["tokens"].tobytes()
    assert generated_of(world.store, life.id) == body["usage"]["completion_tokens"] <= 8
    assert after["forks"] == []


def test_who_says_something_else_after_a_restart_goes_on_in_a_branch(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    life = world.life()
    life.ask({"role": "user", "content": "something else"})
    life.end()
    ((kind, why),) = life.notes
    assert kind == "history_branched"
    assert why.startswith("started again, the program says something else than before")


def test_a_full_episode_says_length_and_refuses_the_next_request(world: World) -> None:
    life = world.life()
    said, body = [ASK], {}
    for _ in range(99):
        answer = life.wait(life.send({"messages": said, "max_tokens": 60}))
        if answer.status != 200:
            break
        body = dict(answer.body)
        said = [*said, answer_of(body), {"role": "user", "content": "more"}]
    assert answer.status == 400
    assert answer.body["error"]["code"] == "context_length_exceeded"
    assert len(world.store.trajectory(life.id)["tokens"]) <= MAX_TOKENS
    life.end()
    assert world.store.trajectory(life.id)["state"] == "unscored"


def test_a_turn_that_fills_the_episode_ends_with_length(world: World) -> None:
    life = world.life()
    while len(world.store.trajectory(life.id)["tokens"]) < MAX_TOKENS:
        body = life.ask(ASK, max_tokens=None)
    assert body["choices"][0]["finish_reason"] == "length"
    assert life.wait(life.send({"messages": [ASK]})).status == 400
    life.end()
    assert world.store.trajectory(life.id)["stop"].name == "LENGTH"


def test_stop_texts_end_a_turn_and_are_not_in_the_answer(world: World) -> None:
    life = world.life()
    for _ in range(5):
        body = life.ask(ASK, stop=["1", "2", "3", "4", "5", "6", "7", "8", "9"], max_tokens=30)
        assert not set(answer_of(body)["content"]) & set("123456789")
        assert body["usage"]["completion_tokens"] <= 30


def test_a_budget_that_is_spent_keeps_the_request_waiting(world: World) -> None:
    life = world.life()
    world.quota(2)
    id = life.send({"messages": [ASK], "max_tokens": 8})
    for _ in range(60):
        life.step()
    assert id not in life.answers
    assert not life.program.killed
    assert len(life.holder) == 0
    assert life.programs.parked() == {life.id: life.epoch}
    world.quota(1 << 20)
    life.lease()
    assert life.wait(id).body["usage"]["completion_tokens"] <= 8
    assert not life.program.killed
    life.end()


def test_rewards_are_the_programs_own_words(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    assert life.wait(life.send(Posted(rewards={"reward": 0.5}))).body == {"rewards": {"reward": 0.5}}
    assert life.wait(life.send(Posted(rewards={"bonus": 1.0}))).body == {"rewards": {"reward": 0.5, "bonus": 1.0}}
    life.program.rewards = {"reward": 0.25, "late": 2.0}
    life.end()
    (unscored,) = world.store.unscored(1, 9.0, 0.0)
    assert unscored.rewards == {"reward": 0.5, "bonus": 1.0, "late": 2.0}  # what was said first stands


def test_a_program_that_is_killed_is_started_again_and_goes_on(world: World) -> None:
    life = world.life()
    first = life.ask(ASK)
    life.program.died = True
    life.end("signal 9")
    assert world.store.trajectory(life.id)["state"] == "idle"
    life.program = Quiet()
    life.lease(new=True)
    assert life.ask(ASK) == first
    life.ask(ASK, answer_of(first), {"role": "user", "content": "?"})
    life.end()
    row = world.store.trajectory(life.id)
    assert (row["state"], row["forks"]) == ("unscored", [])


def test_a_session_takes_no_more_requests_once_it_is_over(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    life.end("exit code 1")
    assert life.wait(life.send({"messages": [ASK]})).status == 410


def test_another_temperature_is_overridden_and_said(world: World) -> None:
    body = world.life().ask(ASK, temperature=0.2, top_p=1)
    assert body["pmdflow"]["sampling"] == {"temperature": 1.0, "top_p": 1.0}
