"""Text environments of the `gymnasium` library, by their id. They need the extra: `uv sync --extra gymnasium`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

from pmdflow.environments.protocol import Observation

try:
    import gymnasium
except ImportError as error:
    raise ImportError(f"the library gymnasium is needed: run `uv sync --extra gymnasium` ({error})") from error


class Gymnasium:
    """One that says texts, or what can be said as a text, and takes texts or one of some named actions.

    An episode begins with the prompt's `seed` (of its metadata; without one it is made of the prompt), so that the
    attempts of a group begin alike, and one that is continued elsewhere goes the same way again.
    """

    def __init__(
        self,
        id: str,
        args: Mapping[str, Any] | None = None,
        *,
        actions: Sequence[str] | None = None,
        says: str = "{observation}\n",
        is_state: bool = False,
    ) -> None:
        """Make it.

        Args:
            id: Such as `FrozenLake-v1`; `module:id` imports the module first.
            args: For `gymnasium.make`.
            actions: Texts of the actions 0, 1, and so on; None: the environment takes texts.
            says: How an observation is said.
            is_state: An observation is the identity of a state.
        """
        self._env = gymnasium.make(id, **dict(args or {}))
        self._actions, self._says, self._is_state = None if actions is None else list(actions), says, is_state

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Begin."""
        observation, _ = self._env.reset(seed=int(metadata.get("seed", crc32(prompt.encode()))))
        return self._said(observation)

    def step(self, *, key: str, action: str) -> Observation:
        """Do it.

        Raises:
            ValueError: there is no such action.
        """
        chosen: Any = action
        if self._actions is not None:
            if action.strip() not in self._actions:
                raise ValueError(f"there is no action {action.strip()!r:.40}; there are {self._actions}")
            chosen = self._actions.index(action.strip())
        observation, reward, terminated, truncated, _ = self._env.step(chosen)
        return self._said(observation, reward=float(reward), done=bool(terminated or truncated))

    def close(self) -> None:
        """Close it."""
        self._env.close()

    def _said(self, observation: Any, *, reward: float | None = None, done: bool = False) -> Observation:
        text = self._says.format(observation=observation)
        return Observation(text=text, reward=reward, done=done, key=str(observation) if self._is_state else None)
