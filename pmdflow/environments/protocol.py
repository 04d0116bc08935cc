"""What a trajectory of several turns talks to: a tool, a game, a simulated user."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pmdflow.config.variables import hide, resolve

if TYPE_CHECKING:
    from pmdflow.config.schema import EnvironmentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an environment says."""

    text: str = ""
    """Appended to the trajectory as observed tokens, which have no gradient and cost no budget."""
    done: bool = False
    """The trajectory ends after it."""


class Environment(Protocol):
    """The environment of one trajectory.

    A turn of the model ends with an end of sequence, a stop id or a stop string (`rollout.stop`); it is durable before
    `step` sees it. `reset` may say nothing; a `step` that is not `done` must say something.

    The durable tokens are the only state that outlives a worker. A trajectory that is continued elsewhere gets a new
    object, whose `reset` and `step` are called again with the recorded turns and the same keys, and which must answer
    the same. Keys are unique to the trajectory and the turn: an environment with effects outside itself answers a key
    that it has seen from its records and does nothing a second time.

    Calls run in a thread of their own, one at a time for each trajectory.
    """

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Begin; `metadata` is the prompt's."""

    def step(self, *, key: str, action: str) -> Observation:
        """Answer one turn; `action` is its text, special tokens left out."""


def load_environment(config: EnvironmentConfig) -> Callable[[], Environment]:
    """Import what makes an environment.

    Raises:
        ValueError: it cannot be imported, does not take `environment.args`, or names a variable that is not set.
    """
    args = resolve(config.args)
    module, _, name = config.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
        factory(**args)
    except Exception as error:  # a factory raises whatever it likes
        why = hide(f"{type(error).__name__}: {error}", config.args)
        raise ValueError(f"environment.factory {config.factory} with {config.args}: {why}") from error
    return lambda: factory(**args)
