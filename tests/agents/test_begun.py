"""A branch that was begun and had no token when everything died: the program asks again, in whatever order."""

from __future__ import annotations

from itertools import permutations

import pytest

from pmdflow.agents.requests import parse_turn
from pmdflow.agents.session import AgentSession, _common
from tests.support.agent_world import ASK, Life, World, answer_of, generated_of

PLAN, SOLVE = ({"role": "system", "content": text} for text in ("plan", "solve"))
ASKED = ([PLAN, ASK], [PLAN, {"role": "user", "content": "9 - 4"}], [SOLVE, ASK])


def begin(world: World, life: Life, messages: list[dict[str, str]]) -> None:
    """Begin the branch of a conversation, as an actor does that dies before anything of it is durable."""
    held = life.holder[life.id]
    assert isinstance(held.session, AgentSession)
    target = held.session.history.target(parse_turn({"messages": messages, "max_tokens": 8}, chat=True)).tokens
    shared = _common(held.session.record.live, target)
    world.store.fork(life.id, held.epoch, shared - len(held.lease.prompt))
    world.die()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_episode_goes_on_whatever_is_asked_for_first(world: World, order: tuple[int, ...]) -> None:
    life = world.life()
    said = answer_of(life.ask(*ASKED[0]))
    begin(world, life, ASKED[1])
    life = world.life()
    bodies = {nth: life.ask(*ASKED[nth]) for nth in order}
    assert answer_of(bodies[0]) == said
    assert generated_of(world.store, life.id) == sum(one["usage"]["completion_tokens"] for one in bodies.values())
    starts = [start for _, start, _ in world.store.trajectory(life.id)["forks"]]
    assert len(starts) == len(set(starts)) == 2
    life.end()
    assert not [kind for kind, _ in life.notes if kind == "history_ended"]


def test_another_death_afterwards_loses_nothing(world: World) -> None:
    life = world.life()
    life.ask(*ASKED[0])
    begin(world, life, ASKED[1])
    life = world.life()
    bodies = [life.ask(*ASKED[nth]) for nth in (2, 0)]
    world.die()
    life = world.life()
    assert [life.ask(*ASKED[nth]) for nth in (2, 0)] == bodies
