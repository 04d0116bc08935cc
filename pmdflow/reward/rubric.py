"""The rubric: a weighted sum of reward functions named by import path."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat, cast

if TYPE_CHECKING:
    from pmdflow.config.schema import RewardConfig
    from pmdflow.types import Outcome


class RewardFunction(Protocol):
    """Judges one completion."""

    def __call__(self, *, completion: str, prompt: str, metadata: Mapping[str, Any]) -> float:
        """Return a finite number, or raise `InvalidCompletion` where the completion cannot be judged at all."""


class InvalidCompletion(Exception):
    """Raised by a reward function: the completion has no judgeable answer; it gets `reward.invalid`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What one scoring attempt of one completion came to."""

    outcome: Outcome
    reward: float = 0.0
    """Weighted sum; `reward.invalid` if invalid; 0 and without meaning after an infra failure."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Unweighted value of each function by name; all 0 if invalid, empty after an infra failure."""
    message: str = ""
    """Why it is not `scored`."""


def infra_failure(message: str) -> Scored:
    """An attempt that says nothing about the completion."""
    return Scored(outcome="infra_failure", message=message)


class Rubric:
    """Weighted reward functions, called one after the other.

    Example:
        >>> def shout(*, completion, prompt, metadata):
        ...     return float(completion.isupper())
        >>> Rubric(functions={"shout": (shout, 2.0)}, invalid=0.0)(completion="YES", prompt="?", metadata={}).reward
        2.0
    """

    def __init__(self, *, functions: Mapping[str, tuple[RewardFunction, float]], invalid: float) -> None:
        """Make a rubric of `functions`, {component name: (function, weight)}; `invalid` is an invalid one's reward."""
        self._functions = dict(functions)
        self._invalid = invalid

    @property
    def names(self) -> tuple[str, ...]:
        """Component names."""
        return tuple(self._functions)

    def __call__(self, *, completion: str, prompt: str, metadata: Mapping[str, Any]) -> Scored:
        """Score one completion; never raises for what a function does, and never turns a failure into a number."""
        components: dict[str, float] = {}
        for name, (function, _) in self._functions.items():
            try:
                components[name] = _finite(function(completion=completion, prompt=prompt, metadata=metadata))
            except InvalidCompletion as error:
                zeros = dict.fromkeys(self._functions, 0.0)
                return Scored(outcome="invalid", reward=self._invalid, components=zeros, message=f"{name}: {error}")
            except Exception as error:
                return infra_failure(f"{name}: {type(error).__name__}: {error}")
        reward = sum(weight * components[name] for name, (_, weight) in self._functions.items())
        if not math.isfinite(reward):
            return infra_failure(f"the weighted sum of {components} is {reward}")
        return Scored(outcome="scored", reward=reward, components=components)


def load_rubric(config: RewardConfig) -> Rubric:
    """Import the functions of the `reward` section.

    A component is named `module.function` (last part of the module), or by its whole path where that is ambiguous.

    Raises:
        ValueError: a function cannot be imported, is not callable or is listed twice; names its path and the cause.
    """
    paths = [entry.function for entry in config.functions]
    names = _component_names(paths)
    functions = {
        name: (_load(index, entry.function), entry.weight)
        for index, (name, entry) in enumerate(zip(names, config.functions, strict=True))
    }
    return Rubric(functions=functions, invalid=config.invalid)


def _component_names(paths: Sequence[str]) -> list[str]:
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ValueError(
                f"reward.functions[{index}]: {path!r} is listed twice; give it once, with its whole weight"
            )
    short = [path.replace(":", ".").rsplit(".", 2)[-2:] for path in paths]
    return [".".join(name) if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def _load(index: int, path: str) -> RewardFunction:
    where = f"reward.functions[{index}].function {path!r}"
    module_name, _, name = path.partition(":")  # the configuration's schema sees to the form
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{where}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: module {module_name} has no {name!r}{hint}")
    if not callable(function):
        raise ValueError(f"{where} is a {type(function).__name__}, not a function")
    return cast(RewardFunction, function)


def _finite(value: object) -> float:
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        raise TypeError(f"returned {value!r}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}, not a finite number")
    return number
