"""What a program says of its episode is durable before it is answered, and counts once, whatever dies."""

from __future__ import annotations

from typing import Any

import pytest

from pmdflow.agents.requests import Posted
from pmdflow.agents.rewards import MAX_NAMES
from tests.support.agent_world import ASK, Life, Quiet, World, answer_of


def say(life: Life, **rewards: float) -> Any:
    return life.wait(life.send(Posted(rewards=rewards)))


def judged(world: World) -> dict[str, float]:
    (unscored,) = world.store.unscored(1, 9.0, 0.0)
    return dict(unscored.rewards)


def test_rewards_are_the_programs_own_words(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    assert say(life, reward=0.5).body == {"rewards": {"reward": 0.5}}
    assert say(life, bonus=1.0).body == {"rewards": {"reward": 0.5, "bonus": 1.0}}
    assert say(life, bonus=1.0).status == 200  # sent again
    refused = say(life, bonus=2.0)
    assert (refused.status, "is 1.0 already, not 2.0" in refused.body["error"]["message"]) == (400, True)
    life.program.rewards = {"reward": 0.25, "late": 2.0}
    life.end()
    assert judged(world) == {"reward": 0.5, "bonus": 1.0, "late": 2.0}
    assert [kind for kind, _ in life.notes] == ["reward_kept"]


def test_a_reward_is_durable_before_it_is_answered(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    noted: list[bool] = []

    def turns(notes: Any) -> list[bool]:
        stale = [world.store.turn(*note) for note in notes]
        noted.append(bool(life.programs.desk._answers))
        return stale

    life.send(Posted(rewards={"reward": 0.5}))
    life.programs.note_rewards(life.holder, turns)
    assert noted == [False]
    assert world.store.trajectory(life.id)["turns"][0][1:] == ({"reward": 0.5}, None)


@pytest.mark.parametrize("answered", [True, False])
def test_a_reward_survives_the_death_of_everything_and_counts_once(world: World, answered: bool) -> None:
    life = world.life()
    first = life.ask(ASK)
    id = life.send(Posted(rewards={"reward": 0.1, "bonus": 0.2}))
    life.programs.note_rewards(life.holder, lambda notes: [world.store.turn(*note) for note in notes])
    if answered:
        life.wait(id)
    world.die()
    life = world.life()
    assert life.ask(ASK) == first
    assert say(life, reward=0.1, bonus=0.3).body == {"rewards": {"reward": 0.1, "bonus": 0.2}}  # another judge
    assert say(life, reward=0.1).status == 200
    life.program.rewards = {"late": 1.0}
    life.end()
    assert judged(world) == {"reward": 0.1, "bonus": 0.2, "late": 1.0}
    assert len(world.store.trajectory(life.id)["turns"]) == 2


def test_a_reward_is_taken_while_the_model_writes_and_in_branches(world: World) -> None:
    life = world.life()
    first = life.ask(ASK)
    asked = life.send({"messages": [ASK, answer_of(first), {"role": "user", "content": "?"}], "max_tokens": 60})
    life.step()
    said = life.send(Posted(rewards={"a": 1.0}))
    life.step()
    assert said in life.answers
    assert asked not in life.answers
    life.wait(asked)
    life.ask(ASK)
    say(life, b=2.0)
    life.end()
    assert judged(world) == {"a": 1.0, "b": 2.0}


def test_a_reward_under_a_lost_lease_is_refused_and_counts_for_nobody(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    world.store.fence("w1")
    assert say(life, reward=1.0).status == 410
    assert world.store.trajectory(life.id)["turns"] == []


def test_a_reward_waits_where_its_program_waits_for_budget(world: World) -> None:
    life = world.life()
    world.quota(2)
    life.send({"messages": [ASK], "max_tokens": 8})
    for _ in range(60):
        life.step()
    assert life.programs.parked()
    said = life.send(Posted(rewards={"reward": 1.0}))
    world.quota(1 << 20)
    life.lease()
    assert life.wait(said).body == {"rewards": {"reward": 1.0}}


def test_a_program_that_dies_has_its_file_read_only_where_it_is_not_started_again(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    life.program.died, life.program.rewards = True, {"reward": 9.0}
    life.end("signal 9")
    life.program = Quiet()
    life.lease(new=True)
    life.ask(ASK)
    life.program.rewards = {"reward": 1.0}
    life.end()
    assert judged(world) == {"reward": 1.0}


def test_an_episode_has_no_more_rewards_than_its_note_may_hold(world: World) -> None:
    life = world.life()
    life.ask(ASK)
    assert say(life, **{f"r{n}": 0.0 for n in range(MAX_NAMES + 1)}).status == 400
    assert say(life, **{f"r{n}": 0.0 for n in range(MAX_NAMES)}).status == 200
    life.program.rewards = {"one_more": 1.0}
    life.end()
    assert len(judged(world)) == MAX_NAMES
    assert "at most" in life.notes[0][1]
