"""What a trajectory of several turns talks to: a tool, a game, a simulated user."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pmdflow.config.imports import load_named
from pmdflow.config.variables import hide, resolve

if TYPE_CHECKING:
    from pmdflow.config.schema import EnvironmentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an environment says: `text`, `messages` or `tokens`, one of them at most."""

    text: str = ""
    """Appended to the trajectory as observed tokens, which have no gradient and cost no budget."""
    messages: Sequence[Mapping[str, Any]] = ()
    """Chat messages, which the model's chat template puts behind the turn that the model has ended."""
    tokens: Sequence[int] = ()
    """Token ids."""
    done: bool = False
    """The trajectory ends after it."""
    reward: float | None = None
    """For the turn that it answers; the episode's `reward` is the sum, which `pmdflow.reward.said:score` gives."""
    key: str | None = None
    """Identity of the state that it leaves: turns of one prompt's attempts that begin in the same one are compared."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Other numbers; the sum of each over the episode is `pmdflow.reward.said:score` with its `name`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastTurn:
    """A turn that was answered before, for `resume`."""

    key: str
    """Of its call."""
    action: str
    observation: str
    """The text of what was appended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What was said of an episode where it stands (`TrajectoryStore.turn`)."""

    number: int
    """Of the episode's notes, from 0."""
    rewards: Mapping[str, float]
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a trajectory goes on with after a turn."""

    tokens: tuple[int, ...] = ()
    """To append as observed."""
    done: bool = False
    problem: str = ""
    """What went wrong, for the run's events."""
    notice: str = ""
    """What is to be known, though nothing failed."""
    note: Note | None = None
    """What is to be durable with it."""
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
    `step` sees it. `reset` may say nothing; a `step` that is not `done` must say something. What `step` is given beside
    `key` goes by the parameters that it has: `action` is the turn's text, special tokens left out; `raw` the text with
    them; `tokens` its ids.

    The durable record is the only state that outlives a worker. A trajectory that is continued elsewhere gets a new
    object. One with a method `resume(*, key, prompt, metadata, turns)` is given the recorded turns (`PastTurn`), and
    nothing is called again. Of any other, `reset` and `step` are called again with the recorded turns and the same
    keys, and must answer the same. Keys are unique to the trajectory and the turn: an environment with effects outside
    itself answers a key that it has seen from its records and does nothing a second time.

    `close`, where there is one, is called when the episode ends or its lease is lost, whatever happened before. Each
    method may be a coroutine. Calls of one object come one at a time, from one thread with one event loop of its own.
    """

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation | Awaitable[Observation]:
        """Begin; `metadata` is the prompt's."""

    def step(self, *, key: str, action: str) -> Observation | Awaitable[Observation]:
        """Answer one turn."""


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
