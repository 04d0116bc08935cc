"""Programs whose leases come and go: what is answered is what is stored, and each turn ends where it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pmdflow.agents.program import Program
from pmdflow.agents.requests import Posted
from pmdflow.errors import PmdflowError
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.rollout.programs import MAX_DEATHS
from pmdflow.store.episodes import MAX_FORKS
from tests.support.agent_world import ASK, Life, Quiet, World, answer_of, generated_of


def give_back(life: Life) -> None:
    """As an actor does where other weights come that a trajectory may not have."""
    life.holder.abort()
    for held in life.holder.resume(life.store.append(life.holder.segments(next_version=0))[1]):
        life.programs.let_go(held, stays=True)
    assert life.programs.parked()


def ended_turn(life: Life, **others: Any) -> str:
    """Ask, and stop as soon as the turn is whole and not durable yet."""
    id = life.send({"messages": [ASK], **others})
    for _ in range(2000):
        life.holder.fill_slots()
        if life.engine.active():
            life.holder.step()
        if len(life.holder) and life.holder[life.id].phase == "ended":
            return id
        life.holder.take_answers()
        if life.engine.active() == 0:
            life.holder.resume(life.store.append(life.holder.segments(next_version=0))[1])
    raise AssertionError("no turn ended")


@pytest.mark.parametrize("others", [{"max_tokens": 4}, {"max_tokens": 200}, {"stop": ["1", "2", "3", "4"]}])
def test_a_turn_that_was_whole_when_its_lease_was_given_back_is_answered_as_it_was(
    world: World, others: dict[str, Any]
) -> None:
    life = world.life()
    id = ended_turn(life, **others)
    count = len(life.holder[life.id].tokens)
    give_back(life)
    life.lease()
    body = life.wait(id).body
    assert body["usage"]["completion_tokens"] == generated_of(world.store, life.id) >= count
    assert generated_of(world.store, life.id) <= others.get("max_tokens", 200)
    assert count == body["usage"]["completion_tokens"]


def test_a_program_does_not_go_on_where_another_actor_has_gone_on_meanwhile(world: World) -> None:
    life = world.life()
    world.quota(2)
    id = life.send({"messages": [ASK], "max_tokens": 8, "logprobs": True})
    for _ in range(60):
        life.step()
    assert life.programs.parked()
    world.quota(1 << 20)
    world.number += 1
    other = Life(world.store, world.engine, world.config, "w2", world.folder.parent / "run")
    said = other.ask(ASK)
    world.store.fence("w2")
    life.lease(new=True)
    for _ in range(5):
        life.step()
    assert life.answers[id].status == 410
    assert life.ask(ASK) == said


def test_a_lease_that_is_given_out_again_ends_the_program_before(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    program = life.program
    life.store.fence("w1")
    life.name, life.program = "w2", Quiet()
    life.lease(new=True)
    assert program.killed


def test_completions_that_go_on_from_each_other_are_replayed_one_by_one(world: World) -> None:
    life = world.life()
    prompt = world.store.trajectory(life.id)["prompt"].tolist()
    bodies = []
    history = list(prompt)
    for _ in range(3):
        answer = life.wait(life.send({"prompt": history, "max_tokens": 3}, chat=False))
        assert answer.status == 200, answer
        bodies.append(answer.body)
        history = [*prompt, *world.store.trajectory(life.id)["tokens"].tolist()]
    life = world.life()
    for body in bodies:
        at = body["usage"]["prompt_tokens"]
        assert life.wait(life.send({"prompt": history[:at], "max_tokens": 3}, chat=False)).body == body
    assert world.store.trajectory(life.id)["forks"] == []


def test_a_text_that_goes_on_from_earlier_ones_is_no_branch_whatever_ended_them(world: World) -> None:
    life = world.life()
    text, finished = "<pad>1 + 2", set[str]()
    for _ in range(6):
        (choice,) = life.wait(life.send({"prompt": text, "max_tokens": 30}, chat=False)).body["choices"]
        text += choice["text"] + " + 1"
        finished.add(choice["finish_reason"])
    assert "stop" in finished  # an end of sequence, which is in the history and in no text
    assert world.store.trajectory(life.id)["forks"] == []


def fork_and_die(world: World, *first: Any) -> None:
    """An actor dies when it has begun a branch and sent nothing of it."""
    life = world.life()
    body = life.ask(*first)
    life.ask(*first, answer_of(body), {"role": "user", "content": "!"})
    life.send({"messages": [*first, answer_of(body), {"role": "user", "content": "?"}], "max_tokens": 8})
    life.holder.take_answers()
    (held,) = life.holder.forks()
    assert held.fork is not None
    world.store.fork(held.id, held.epoch, held.fork)


def test_a_branch_without_a_token_is_gone_on_with(world: World) -> None:
    fork_and_die(world, ASK)
    life = world.life()
    first = life.ask(ASK)
    life.ask(ASK, answer_of(first), {"role": "user", "content": "?"})
    assert len(world.store.trajectory(life.id)["forks"]) == 1


def test_of_several_requests_whichever_comes_first_takes_an_empty_branch(world: World) -> None:
    fork_and_die(world, ASK)
    life = world.life()
    first = life.ask(ASK)
    other = life.send({"messages": [{"role": "user", "content": "other"}], "max_tokens": 8})
    wanted = life.send({"messages": [ASK, answer_of(first), {"role": "user", "content": "?"}], "max_tokens": 8})
    assert [life.wait(wanted).status, life.wait(other).status] == [200, 200]
    assert len(world.store.trajectory(life.id)["forks"]) == 2


def test_who_says_something_else_than_what_an_empty_branch_keeps_begins_it_anew(world: World) -> None:
    fork_and_die(world, ASK)
    life = world.life()
    ((_, _, kept),) = world.store.trajectory(life.id)["forks"]
    life.ask({"role": "user", "content": "other"})
    ((_, _, now),) = world.store.trajectory(life.id)["forks"]
    assert now < kept
    life.end()
    assert [kind for kind, _ in life.notes] == ["history_branched"]


def test_the_last_turn_before_an_empty_branch_is_answered_as_it_was(world: World) -> None:
    life = world.life()
    first = life.ask(ASK)
    held = life.holder[life.id]
    world.store.fork(life.id, held.epoch, 0)
    life = world.life()
    assert life.wait(life.send({"messages": [ASK], "max_tokens": 200})).body == first
    for _ in range(3):
        life.ask(ASK)
    row = world.store.trajectory(life.id)
    assert len(row["forks"]) == 3


def test_a_program_that_has_ended_asks_for_nothing_more(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    life.send({"messages": [ASK], "max_tokens": 8})
    life.send(Posted(rewards={"reward": 1.0}))
    life.end()
    assert world.store.trajectory(life.id)["forks"] == []
    (unscored,) = world.store.unscored(1, 9.0, 0.0)
    assert unscored.rewards == {"reward": 1.0}


def test_an_engine_is_asked_for_no_more_than_the_request(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    add = world.engine.add
    monkeypatch.setattr(world.engine, "add", lambda request: (asked.append(request.limit), add(request))[1])
    world.life().ask(ASK, n=3)
    assert len(asked) == 3
    assert max(asked) <= 8


def test_a_stop_text_of_the_run_ends_a_turn_and_stays_in_the_answer(
    tmp_path: Path, engine: TransformersEngine, folders: dict[str, Path]
) -> None:
    digits = [str(digit) for digit in range(10)]
    world = World(tmp_path, engine, folders[""], f"rollout.stop=[{','.join(repr(digit) for digit in digits)}]")
    first = world.life().ask(ASK, max_tokens=100)
    assert first["choices"][0]["finish_reason"] == "stop"
    assert answer_of(first)["content"][-1] in digits
    life = world.life()
    assert life.ask(ASK, max_tokens=100) == first
    life.end()
    world.store.close()


def test_what_a_program_said_at_its_end_is_told_without_the_values_of_variables(
    tmp_path: Path, engine: TransformersEngine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCH_KEY", "sk-of-another")
    world = World(tmp_path, engine, folders[""], "agents.args={key: '${SEARCH_KEY}'}", "agents.max_failures_in_a_row=1")
    life = world.life()
    with pytest.raises(PmdflowError, match="SEARCH_KEY") as raised:
        life.end("exit code 1; it said: 'sk-of-another is no key'")
    assert "sk-of-another" not in str(raised.value)
    engine.abort(life.id)
    world.store.close()


def test_a_program_whose_tokens_were_lost_on_the_way_is_started_anew(world: World) -> None:
    life = world.life()
    id = ended_turn(life, max_tokens=8)
    life.store.fence("w1")  # nothing of the turn is durable, and the lease is another's
    life.name = "w2"
    give_back(life)
    life.lease(new=True)
    for _ in range(3):
        life.step()
    assert life.answers[id].status == 410
    body = life.ask(ASK)
    assert body["usage"]["completion_tokens"] == generated_of(world.store, life.id)


def test_a_lease_that_ended_before_it_was_taken_up_is_not_held(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    life.store.fence("w1")
    (lease,) = world.store.lease("w2", 0, 1, 5.0)
    world.store.fence("w2")
    world.store.lease("w3", 0, 1, 5.0)
    life.holder.join(lease, grant=9)
    assert len(life.holder) == 0
    life.programs._read = lambda _: None
    life.holder.join(lease, grant=9)
    assert len(life.holder) == 0


def test_an_episode_has_no_more_branches_than_the_store_takes(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    session: Any = life.holder[life.id].session
    session.record.forks = MAX_FORKS
    refused = life.wait(life.send({"messages": [ASK], "max_tokens": 8}))
    assert (refused.status, refused.body["error"]["message"][:32]) == (400, "an episode begins at most 1023 b")


def test_a_program_that_cannot_be_started_is_tried_again_and_then_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any, **__: Any) -> Program:
        raise OSError(11, "Resource temporarily unavailable")

    life = world.life()
    monkeypatch.setattr(Program, "start", start)
    world.store.fence("w1")
    life.name = "w2"
    del life.programs._launcher.start
    for _ in range(4):
        life.lease(new=True)
        for _ in range(20):
            life.step()
    assert world.store.trajectory(life.id)["state"] == "unscored"


def test_no_more_programs_wait_than_may_run(
    tmp_path: Path, engine: TransformersEngine, folders: dict[str, Path]
) -> None:
    world = World(tmp_path, engine, folders[""], "agents.concurrency=1", group_size=2)
    life = world.life()
    (other,) = world.store.lease(life.name, 0, 1, 5.0)
    life.holder.join(other, grant=other.grant)
    world.quota(2)
    first = life.send({"messages": [ASK], "max_tokens": 60})
    life.send({"messages": [ASK], "max_tokens": 60}, trajectory=other.trajectory)
    for _ in range(60):
        life.step()
    assert len(life.holder) == 0
    assert len(life.programs.parked()) == life.programs.most == 1
    assert other.trajectory in life.programs.parked()
    assert "too many programs wait" in life.answers[first].body["error"]["message"]
    life.programs.close()
    world.store.close()


class Watch:
    """Stands for what looks for loops."""

    def __init__(self, begun: list[list[int]]) -> None:
        self.begun = begun

    def anew(self, history: Any) -> Watch:
        self.begun.append(list(history))
        return self

    def find(self, tokens: Any) -> None:
        """There is none."""


def test_loops_are_looked_for_within_a_turn(world: World) -> None:
    life = world.life()
    held: Any = life.holder[life.id]
    held.repetition = Watch([])
    life.ask(ASK)
    life.ask(ASK)
    assert held.repetition.begun == [[], []]
    before = generated_of(world.store, life.id)
    life.send({"messages": [ASK], "max_tokens": 60})
    while generated_of(world.store, life.id) == before:
        life.step()
    said = world.store.trajectory(life.id)["tokens"].tolist()
    life = world.life()
    held = life.holder[life.id]
    held.repetition = Watch([])
    for tokens in (8, 8, 60):
        life.ask(ASK, max_tokens=tokens)
    (whole,) = held.repetition.begun
    assert said[-len(whole) :] == whole
    assert whole


def test_a_program_that_dies_wherever_it_is_started_ends_its_episode(world: World) -> None:
    for death in range(MAX_DEATHS + 1):
        life = world.life()  # another actor
        assert world.store.trajectory(life.id)["state"] == "leased", f"ended after {death} deaths"
        life.program.died = True
        life.end("signal 9")
    assert world.store.trajectory(life.id)["state"] == "unscored"
