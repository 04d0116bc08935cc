"""Environments of the `openenv` library, by their servers' addresses; the extra is `uv sync --extra openenv`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pmdflow.environments.protocol import Observation

try:
    from openenv.core.generic_client import GenericEnvClient
except ImportError as error:
    raise ImportError(f"the library openenv is needed: run `uv sync --extra openenv` ({error})") from error


class OpenEnv:
    """A session of an OpenEnv server. The server's reward of each turn is the turn's.

    The session ends with its connection: a trajectory that is continued elsewhere begins another, and goes through its
    turns again (`Environment`), so that the server must answer them alike, with the same `seed`.
    """

    def __init__(
        self,
        url: str,
        *,
        action: str = "message",
        observation: str | None = None,
        state_key: str | None = None,
        reset: Mapping[str, Any] | None = None,
        from_metadata: tuple[str, ...] | list[str] = (),
        timeout_s: float = 10.0,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: Of the server, `http://HOST:PORT`.
            action: Field of its action that takes the model's text.
            observation: Field of its observation that is said to the model; None says all of it, as JSON.
            state_key: Field of its observation that is the identity of a state.
            reset: Arguments of its `reset`, beside the `episode_id`, which is the trajectory's key.
            from_metadata: Names in a prompt's metadata that its `reset` is given too, such as `seed`.
            timeout_s: Of each message.
        """
        self._action, self._observation, self._state_key = action, observation, state_key
        self._reset, self._from_metadata = dict(reset or {}), tuple(from_metadata)
        self._client = GenericEnvClient(base_url=url, connect_timeout_s=timeout_s, message_timeout_s=timeout_s)

    async def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Begin an episode."""
        await self._client.connect()
        chosen = {name: metadata[name] for name in self._from_metadata}
        return self._said(await self._client.reset(episode_id=key, **self._reset, **chosen))

    async def step(self, *, key: str, action: str) -> Observation:
        """Send the model's turn."""
        return self._said(await self._client.step({self._action: action}))

    async def close(self) -> None:
        """End the session."""
        await self._client.close()

    def _said(self, result: Any) -> Observation:
        observation = dict(result.observation)
        for name in (self._observation, self._state_key):
            if name is not None and name not in observation:
                raise ValueError(f"the observation has no field {name!r}; it has {sorted(observation)}")
        said = json.dumps(observation) if self._observation is None else str(observation[self._observation])
        return Observation(
            text=said,
            done=bool(result.done),
            reward=None if result.reward is None else float(result.reward),
            key=None if self._state_key is None else str(observation[self._state_key]),
        )
