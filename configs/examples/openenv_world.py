"""The key-and-door world behind an OpenEnv server, which `openenv.yaml` trains with.

`python openenv_world.py PORT` serves it; `make` starts one for each rollout actor.
"""

from __future__ import annotations

import atexit
import socket
import subprocess
import sys
import time
from functools import lru_cache
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

from pmdflow.environments.key_and_door import KeyAndDoor
from pmdflow.environments.openenv import OpenEnv

START_S = 60.0


class Said(Observation):
    """What the world says."""

    text: str = ""
    room: str = ""


class Does(Action):
    """What is done in it."""

    message: str


class World(Environment[Does, Said, State]):
    """As anybody serves one."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        """Begin nowhere."""
        super().__init__()
        self._world, self._state = KeyAndDoor(), State()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **layout: Any) -> Said:
        """Begin in the first room."""
        self._state = State(episode_id=episode_id, step_count=0)
        said = self._world.reset(key="", prompt="", metadata=layout)
        return Said(text=said.text, room=str(said.key))

    def step(self, action: Does, timeout_s: float | None = None, **_: Any) -> Said:
        """Go, take or open."""
        self._state.step_count += 1
        said = self._world.step(key="", action=action.message)
        return Said(text=said.text, room=str(said.key), done=said.done, reward=said.reward or 0.0)

    @property
    def state(self) -> State:
        """Where the episode is."""
        return self._state


@lru_cache(maxsize=1)
def _server() -> str:
    """The address of a server of this process, which ends with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", sys.executable, __file__, str(port)])  # noqa: S607
    atexit.register(process.kill)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with socket.socket() as there:
            if there.connect_ex(("127.0.0.1", port)) == 0:
                return f"http://127.0.0.1:{port}"
        time.sleep(0.1)
    raise TimeoutError(f"the OpenEnv server did not begin within {START_S:g} s")


def make() -> OpenEnv:
    """The environment of one trajectory; of a server that stands it is `OpenEnv(url)`."""
    return OpenEnv(
        _server(),
        observation="text",
        state_key="room",
        from_metadata=("rooms", "key", "door", "start"),
    )


if __name__ == "__main__":
    app = create_fastapi_app(World, Does, Said, max_concurrent_envs=1024)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
