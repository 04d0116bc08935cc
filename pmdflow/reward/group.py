"""Rewards of a whole group, made at the claim of what the store holds: pure, so a replay makes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmdflow.reward.function import load_function
from pmdflow.reward.rubric import component_names
from pmdflow.types import Float64, Int64, UInt8

if TYPE_CHECKING:
    from pmdflow.config.sources import RewardFunctionConfig

VISITS = "pmdflow_visits"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """One group: k episodes of a prompt.

    Example:
        >>> view.lengths[view.correct].mean()               # doctest: +SKIP
        93.5
    """

    iteration: int
    prompt_id: str
    rewards: Float64
    """What the functions gave, weighted, before penalties [k]."""
    components: Mapping[str, Float64]
    """What each gave, unweighted, by name, each [k]; NaN where an episode has none."""
    answers: Mapping[str, Float64]
    """Keys of the answers of functions that return `Judged`, by the name of the component, each [k]; NaN for none."""
    correct: npt.NDArray[np.bool_]
    """[k]"""
    lengths: Int64
    """Generated tokens [k]."""
    stops: UInt8
    """`Stop` [k]."""


Visit = Mapping[str, Any]
"""One earlier claim: `iteration`, `correct` (share), and `answers`: {component: [[key, how often], ...]}."""
History = Sequence[Visit]
"""Earlier claims of a prompt, oldest first; empty unless the function is one that `remembers`."""
GroupReward = Callable[[GroupView, History], Mapping[str, Float64]]
"""New components of a group by name, each [k]; their sum counts with the weight of the function."""


def remembers(visits: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a group reward get the last `visits` earlier claims of its prompt, which checkpoints keep.

    Example:
        >>> @remembers(8)
        ... def stable(view, history):
        ...     return {"seen": np.full(len(view.rewards), float(len(history)))}
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, VISITS, visits)
        return function

    return mark


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFunction:
    """A group reward with its weight."""

    name: str
    weight: float
    visits: int
    """Earlier claims of the prompt that it asks for."""
    call: GroupReward

    def components(self, view: GroupView, history: History) -> dict[str, Float64]:
        """What it makes of a group, by name of the component.

        Raises:
            ValueError: a value is not finite, or there is not one for each episode.
        """
        found = {}
        for key, values in self.call(view, history[-self.visits :] if self.visits else ()).items():
            array, count = np.asarray(values, np.float64), len(view.rewards)
            if array.shape != (count,) or not np.isfinite(array).all():
                raise ValueError(
                    f"group reward {self.name}: {key!r} is {array!r:.200} for the {count} episodes of "
                    f"{view.prompt_id}: give one finite number each"
                )
            found[f"{self.name}.{key}"] = array
        return found


def load_group_functions(configs: Sequence[RewardFunctionConfig]) -> list[GroupFunction]:
    """Import the functions of `reward.group`.

    Raises:
        ValueError: one cannot be imported, or is listed twice.
    """
    names = component_names([entry.function for entry in configs])
    loaded = []
    for name, entry in zip(names, configs, strict=True):
        function = _load(entry.function)
        call = partial(function, **entry.args) if entry.args else function
        visits = int(getattr(function, VISITS, 0))
        loaded.append(GroupFunction(name=name, weight=entry.weight, visits=visits, call=call))
    return loaded


@lru_cache(maxsize=64)
def _load(path: str) -> Callable[..., Any]:
    return load_function(path)


def visit(view: GroupView) -> dict[str, Any]:
    """What is remembered of a group, in plain values."""
    counts = {
        name: [[key, count] for key, count in sorted(Counter(keys[~np.isnan(keys)].tolist()).items())]
        for name, keys in view.answers.items()
    }
    return {"iteration": view.iteration, "correct": float(view.correct.mean()), "answers": counts}
