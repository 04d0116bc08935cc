"""The text world: its rules, and that a recorded way leads to the same place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.environments.key_and_door import KeyAndDoor
from pmdflow.environments.protocol import Observation, PastTurn

LAYOUT = {"rooms": 4, "key": 1, "door": 4, "start": 2}
actions = st.lists(st.sampled_from(["left\n", "right\n", "take\n", "open\n", "?"]), max_size=14)


def begun(**arguments: Any) -> KeyAndDoor:
    world = KeyAndDoor(**arguments)
    world.reset(key="", prompt="", metadata=LAYOUT)
    return world


def play(world: KeyAndDoor, *actions: str) -> list[Observation]:
    return [world.step(key="", action=action) for action in actions]


def test_the_door_opens_with_the_key_and_states_have_names() -> None:
    assert KeyAndDoor().reset(key="", prompt="", metadata=LAYOUT) == Observation(text="room 2\n", key="2")
    said = play(begun(), "open\n", "left", "left", "take", "take", "right", "right", "right", "open")
    texts = ["locked", "room 1: key", "wall", "taken", "nothing", "room 2", "room 3", "room 4: door", "open"]
    assert [one.text for one in said] == [f"{text}\n" for text in texts]
    assert [one.key for one in said][2:6] == ["1", "1 with key", "1 with key", "2 with key"]
    assert (said[-1].done, said[-1].reward, said[3].metrics) == (True, 1.0, {"took_key": 1.0})
    assert all(one.reward is None and not one.done for one in said[:-1])


def test_an_episode_ends_after_its_turns() -> None:
    last = play(begun(max_turns=3), "left", "left", "shout")[-1]
    assert (last.text, last.done, last.reward) == ("?\n", True, 0.0)


@given(before=actions, after=actions)
def test_a_world_that_is_resumed_goes_on_as_if_nothing_had_happened(before: list[str], after: list[str]) -> None:
    whole, again = begun(), KeyAndDoor()
    said = play(whole, *before)
    past = [PastTurn(key="", action=act, observation=one.text) for act, one in zip(before, said, strict=True)]
    again.resume(key="", prompt="", metadata=LAYOUT, turns=past)
    assert play(again, *after) == play(whole, *after)


@pytest.mark.parametrize("wrong", [{"rooms": 0}, {"key": 5}, {"door": None}, {"start": "2"}, {"rooms": None}])
def test_metadata_that_are_no_world_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="from 1 to `rooms`"):
        KeyAndDoor().reset(key="", prompt="", metadata=LAYOUT | wrong)
