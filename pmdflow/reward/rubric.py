"""The rubric: a weighted sum of reward functions named by import path."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pmdflow.config.imports import shown
from pmdflow.config.sources import SOURCE_KEY
from pmdflow.config.variables import hide, resolve
from pmdflow.reward.function import RewardFunction, bind, load_function
from pmdflow.reward.judged import ANSWER, answer_key

if TYPE_CHECKING:
    from pmdflow.config.schema import RewardConfig
    from pmdflow.config.sources import RewardFunctionConfig
    from pmdflow.types import Outcome


class InvalidCompletion(Exception):
    """Raised by a reward function: the completion has no judgeable answer; it gets `reward.invalid`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What one scoring attempt of one completion came to."""

    outcome: Outcome
    reward: float = 0.0
    """Weighted sum; `reward.invalid` if invalid; 0 and without meaning after an infra failure."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Unweighted value of each function, and keys of answers; all 0 if invalid, empty after an infra failure."""
    message: str = ""
    """Why it is not `scored`."""


def infra_failure(message: str) -> Scored:
    """An attempt that says nothing about the completion."""
    return Scored(outcome="infra_failure", message=message)


class Rubric:
    """Weighted reward functions, called one after the other.

    Example:
        >>> def shout(*, completion):
        ...     return float(completion.isupper())
        >>> Rubric(functions=[bind(shout, name="shout", weight=2.0)], invalid=0.0, max_abs=1e6)(completion="YES").reward
        2.0
    """

    def __init__(
        self, *, functions: Sequence[RewardFunction], invalid: float, max_abs: float, args: Sequence[Any] = ()
    ) -> None:
        """Make a rubric.

        Args:
            functions: Its functions.
            invalid: Reward of an invalid completion.
            max_abs: Bound of every other.
            args: Settings of the functions as written: messages quote no variable of theirs.
        """
        self._args = list(args)
        self._functions = tuple(functions)
        self._invalid = invalid
        self._max_abs = max_abs

    @property
    def names(self) -> tuple[str, ...]:
        """Component names."""
        return tuple(function.name for function in self._functions)

    @property
    def inputs(self) -> frozenset[str]:
        """What its functions ask for: keys of `pmdflow.reward.function.INPUTS`."""
        return frozenset(name for function in self._functions for name in function.inputs)

    @property
    def is_concurrent(self) -> bool:
        """Whether it judges many completions at once in one event loop."""
        return any(function.is_concurrent for function in self._functions)

    def __call__(self, **inputs: Any) -> Scored:
        """Score one completion, outside an event loop; as `score`."""
        scoring = self.score(inputs)
        if self.is_concurrent:
            return asyncio.run(scoring)
        try:
            scoring.send(None)  # without a loop, so that plain functions may have loops of their own
        except StopIteration as end:
            scored: Scored = end.value
            return scored
        raise AssertionError("plain functions never wait")

    async def score(self, inputs: Mapping[str, Any]) -> Scored:
        """Score one completion; never raises for what a function does, and never turns a failure into a number."""
        scored = await self._score(inputs)
        return replace(scored, message=hide(scored.message, self._args)) if scored.message else scored

    async def _score(self, inputs: Mapping[str, Any]) -> Scored:
        components: dict[str, float] = {}
        for function in self._functions:
            try:
                judged = await function.judge(inputs)
            except InvalidCompletion as error:
                zeros = dict.fromkeys(self.names, 0.0)
                message = f"{function.name}: {error}"
                return Scored(outcome="invalid", reward=self._invalid, components=zeros, message=message)
            except Exception as error:
                return infra_failure(f"{function.name}: {type(error).__name__}: {error}")
            if abs(judged.value) > self._max_abs:
                return infra_failure(f"{function.name}: returned {judged.value:g}, {self._beyond}")
            components[function.name] = judged.value
            if judged.answer is not None:
                components[f"{function.name}{ANSWER}"] = answer_key(judged.answer)
        reward = sum(function.weight * components[function.name] for function in self._functions)
        if not abs(reward) <= self._max_abs:  # NaN as well
            return infra_failure(f"the weighted sum of {components} is {reward:g}, {self._beyond}")
        return Scored(outcome="scored", reward=reward, components=components)

    @property
    def _beyond(self) -> str:
        return f"beyond reward.max_abs ({self._max_abs:g}): scale it, or raise the bound"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubrics:
    """The rubric of every source of prompts."""

    default: Rubric
    own: Mapping[str, Rubric]
    """Of the sources that have their own, by name; "" is what prompts of a single source are of."""

    @property
    def inputs(self) -> frozenset[str]:
        """What the functions of any ask for."""
        return frozenset().union(*(rubric.inputs for rubric in (self.default, *self.own.values())))

    @property
    def is_concurrent(self) -> bool:
        """Whether completions are judged many at once: if one rubric does so, all do."""
        return any(rubric.is_concurrent for rubric in (self.default, *self.own.values()))

    def of(self, metadata: Mapping[str, Any]) -> Rubric:
        """The rubric of a prompt."""
        return self.own.get(metadata.get(SOURCE_KEY, ""), self.default)


def load_rubrics(config: RewardConfig, own: Mapping[str, Sequence[RewardFunctionConfig]]) -> Rubrics:
    """Import the functions of the `reward` section and of the sources that have their own.

    Raises:
        ValueError: as `load_rubric`.
    """
    rubrics = {name: load_rubric(config.model_copy(update={"functions": given})) for name, given in own.items()}
    return Rubrics(default=load_rubric(config), own=rubrics)


def load_rubric(config: RewardConfig) -> Rubric:
    """Import the functions of the `reward` section.

    A component is named `module.function` (last part of the module), or by its whole path where that is ambiguous.

    Raises:
        ValueError: a function cannot be imported or called, or is listed twice; names its path and the cause.
    """
    names = component_names([entry.function for entry in config.functions])
    functions = []
    for index, (name, entry) in enumerate(zip(names, config.functions, strict=True)):
        try:
            functions.append(
                bind(load_function(entry.function), name=name, weight=entry.weight, args=resolve(entry.args))
            )
        except ValueError as error:
            raise ValueError(f"reward.functions[{index}].function {entry.function!r}: {error}") from error
    written = [entry.args for entry in config.functions]
    return Rubric(functions=functions, invalid=config.invalid, max_abs=config.max_abs, args=written)


def component_names(paths: Sequence[str]) -> list[str]:
    """The name of each function's component: the last part of its module and its name, or all where that is ambiguous.

    Raises:
        ValueError: a path is listed twice.
    """
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ValueError(
                f"reward.functions[{index}]: {path!r} is listed twice; give it once, with its whole weight"
            )
    whole = [shown(path) for path in paths]  # the folder says where, not what
    short = [path.replace(":", ".").rsplit(".", 2)[-2:] for path in whole]
    return [".".join(name) if short.count(name) == 1 else path for name, path in zip(short, whole, strict=True)]
