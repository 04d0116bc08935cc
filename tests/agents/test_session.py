"""The conversation of one program, through a real engine and store: what a client is told, and what the store holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from tests.support.agent_world import ASK, MAX_TOKENS, Quiet, World, answer_of, generated_of


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
    again = life.wait(life.send({"messages": [ASK], "max_tokens": 8}, attempt=1)).body
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


def test_a_turn_that_another_conversation_overtook_after_a_restart_is_generated_anew(world: World) -> None:
    life = world.life()
    life.send({"messages": [ASK], "max_tokens": 8})
    while generated_of(world.store, life.id) == 0:
        life.step()
    assert generated_of(world.store, life.id) < 3, "a part of the turn"
    life = world.life()
    life.ask({"role": "user", "content": "something else"})
    body = life.ask(ASK)
    record = world.store.trajectory(life.id)
    assert len(record["forks"]) == 2
    _, begun, _ = record["forks"][-1]
    assert (record["observed"][begun:] == 0).sum() == body["usage"]["completion_tokens"]


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
