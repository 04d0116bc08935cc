"""A small text world: rooms in a row, a key in one and a door in another. `configs/key_and_door.yaml` trains in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmdflow.environments.protocol import Observation, PastTurn

_MOVES = {"left": -1, "right": 1}


@dataclass(slots=True)
class _World:
    rooms: int
    key: int
    door: int
    room: int
    """Where the model is, from 1."""
    has_key: bool = False
    turns: int = 0

    @property
    def says(self) -> str:
        """What is to be seen in the room."""
        if self.room == self.door:
            return f"room {self.room}: door\n"
        return f"room {self.room}: key\n" if self.room == self.key and not self.has_key else f"room {self.room}\n"

    def act(self, action: str) -> str:
        """The answer to `left`, `right`, `take` and `open`, which is `open` for the right door at the right time."""
        self.turns += 1
        if action in _MOVES:
            self.room += _MOVES[action]
            if 1 <= self.room <= self.rooms:
                return self.says
            self.room -= _MOVES[action]
            return "wall\n"
        if action == "take":
            if self.room != self.key or self.has_key:
                return "nothing\n"
            self.has_key = True
            return "taken\n"
        if action == "open":
            return "open\n" if self.room == self.door and self.has_key else "locked\n"
        return "?\n"


class KeyAndDoor:
    r"""The model finds the key, takes it, finds the door and opens it, and sees only the room that it is in.

    A prompt's metadata say where all is: `rooms`, `key`, `door` and `start`. The reward of an episode is 1 for the open
    door; `took_key` is a metric. States repeat: their identity is the room and whether the model has the key.

    Example:
        >>> world = KeyAndDoor()
        >>> layout = {"rooms": 3, "key": 1, "door": 3, "start": 2}
        >>> world.reset(key="7/0", prompt="", metadata=layout).text
        'room 2\n'
        >>> world.step(key="7/1", action="left\n").text
        'room 1: key\n'
    """

    def __init__(self, max_turns: int = 12) -> None:
        """An episode ends after `max_turns`, at the latest."""
        self._max_turns = max_turns
        self._world = _World(rooms=0, key=0, door=0, room=0)

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Begin in the first room.

        Raises:
            ValueError: the metadata lack a number, or it is of no room.
        """
        names = ("rooms", "key", "door", "start")
        layout: dict[str, Any] = {name: metadata.get(name) for name in names}
        rooms = layout["rooms"]
        if not all(isinstance(number, int) and 1 <= number <= rooms for number in (rooms, *layout.values())):
            raise ValueError(f"metadata {layout}: each is the number of a room, from 1 to `rooms`")
        self._world = _World(rooms=rooms, key=layout["key"], door=layout["door"], room=layout["start"])
        return Observation(text=self._world.says, key=self._state)

    def step(self, *, key: str, action: str) -> Observation:
        """Go, take or open."""
        had_key = self._world.has_key
        text = self._world.act(action.strip())
        is_open = text == "open\n"
        done = is_open or self._world.turns >= self._max_turns
        return Observation(
            text=text,
            done=done,
            reward=float(is_open) if done else None,
            key=self._state,
            metrics={"took_key": 1.0} if self._world.has_key and not had_key else {},
        )

    def resume(self, *, key: str, prompt: str, metadata: Mapping[str, Any], turns: Sequence[PastTurn]) -> None:
        """Walk the recorded way again."""
        self.reset(key=key, prompt=prompt, metadata=metadata)
        for turn in turns:
            self._world.act(turn.action.strip())

    @property
    def _state(self) -> str:
        return f"{self._world.room}{' with key' if self._world.has_key else ''}"
