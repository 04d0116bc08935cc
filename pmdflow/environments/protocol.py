"""What a trajectory of several turns talks to: a tool, a game, a simulated user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pmdflow.config.imports import load_named
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a trajectory goes on with after a turn."""

    tokens: tuple[int, ...] = ()
    """To append as observed."""
    done: bool = False
    problem: str = ""
    """What went wrong, for the run's events."""
    again: bool = False
    """The lease is to be given back: whoever gets it begins anew and goes on from the record."""
    fork: int | None = None
    """A branch begins, with so many tokens after the prompt; what else the history had is left out of it."""
    turn: int | None = None
    """Tokens at the end of the history that are of the model's present turn; None: as before, or 0 behind `tokens`."""


class Partner(Protocol):
    """What a trajectory of several turns talks to, as its rollout actor sees it; all calls come from one thread."""

    outlives: bool
    """It goes on when the trajectory is full, and says itself when all is over."""

    @property
    def call(self) -> Future[Any] | None:
        """Done when there may be something to poll for."""

    @property
    def over(self) -> bool:
        """It has ended although the model's turn has not."""

    @property
    def limit(self) -> int | None:
        """Tokens that the present turn may still have; None is unlimited."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end the present turn, besides those of the run."""

    def start(self, action: tuple[int, ...] | None) -> None:
        """Take a turn that is whole and durable; None begins."""

    def generated(self, logprobs: Sequence[float], version: int) -> None:
        """Take the log-probs of tokens of the present turn."""

    def poll(self) -> Reply | None:
        """What the trajectory goes on with, if it is there."""

    def close(self, why: str) -> None:
        """End it: the trajectory is complete, or another actor has it."""


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
    try:
        factory = load_named(config.factory)
        factory(**args)
    except Exception as error:  # a factory raises whatever it likes
        why = hide(f"{type(error).__name__}: {error}", config.args)
        raise ValueError(f"environment.factory {config.factory} with {config.args}: {why}") from error
    return lambda: factory(**args)
