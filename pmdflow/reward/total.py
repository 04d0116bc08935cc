"""The reward that a trajectory is trained with: what its functions gave, and what depends on its end and its group.

It is computed at the claim from what the store holds, so a replay can compute it anew with other settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmdflow.reward.group import GroupFunction, GroupView, History, load_group_functions, visit
from pmdflow.reward.judged import ANSWER
from pmdflow.reward.length import LENGTH, length_of_group
from pmdflow.reward.rubric import component_names
from pmdflow.types import Claim, Float64, Mask, Stop, TrainBatch

if TYPE_CHECKING:
    from pmdflow.config.schema import RewardConfig

CORRECT_REWARD = 0.5
"""A trajectory is correct from this reward on: it separates 0 and 1 as well as -1 and 1."""
Memory = Mapping[str, History]
"""Earlier claims by prompt id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalRewards:
    """Rewards of a claim, each [N]."""

    task: Float64
    """With the penalties for how a trajectory ended, without group rewards; the group filter reads these."""
    total: Float64
    """What advantages are made of."""
    correct: npt.NDArray[np.bool_]
    """From `CORRECT_REWARD` on, and not cut at `data.max_tokens` where that has a reward of its own."""
    components: Mapping[str, Float64]
    """Of functions and group rewards, without the keys of answers; NaN where a trajectory has none."""
    weights: Mapping[str, float]
    """Of the components of `reward.functions` and of group rewards, by name."""
    mean: float
    """Of `total` over episodes."""
    length_weight: float
    """Weight of the length reward in `total`; 0 during its warm-up."""
    group_means: Mapping[str, float] = field(default_factory=dict)
    """Of each component of `reward.group`, over episodes."""
    memory: Memory = field(default_factory=dict)
    """What the next claim begins with."""

    def metrics(self) -> dict[str, float]:
        """Mean of `total` over episodes, the weight of the length reward, and the means of group rewards."""
        own = {f"reward/group_{name}_mean": value for name, value in self.group_means.items()}
        return {"reward/total_mean": self.mean, "reward/length_weight": self.length_weight, **own}


def total_rewards(batch: TrainBatch | Claim, reward: RewardConfig, memory: Memory | None = None) -> TotalRewards:
    """Apply the rewards that need the end of a trajectory or its whole group.

    - A trajectory cut at `data.max_tokens` gets `cut_reward`, if that is set, and counts as wrong.
    - One that the repetition detector ended loses `repetition_penalty`.
    - The length reward is added with its weight after `length_warmup_iterations`, then what `reward.group` names.

    `memory` holds earlier claims by prompt, for group rewards that remember.

    Raises:
        ValueError: a group reward cannot be imported, or answers wrongly.

    Source: arXiv:2501.12599 sec. 2.3.3 and fig. 3b; arXiv:2507.20534 sec. 3.2.
    """
    cut = (batch.stops == Stop.LENGTH) & (reward.cut_reward is not None)
    task = np.where(cut, reward.cut_reward or 0.0, batch.rewards)
    task = task - reward.repetition_penalty * (batch.stops == Stop.REPETITION)
    correct = (batch.rewards >= CORRECT_REWARD) & ~cut
    length = reward.length_weight if batch.iteration > reward.length_warmup_iterations else 0.0
    names = component_names([entry.function for entry in reward.functions])
    weights = {name: entry.weight for name, entry in zip(names, reward.functions, strict=True)}
    made, memory = _group_rewards(batch, correct, _group_functions(reward, length), memory or {})
    total, first = task, batch.first_branches()
    for name, (weight, values) in made.items():
        total, weights[name] = total + weight * values, weight
    return TotalRewards(
        task=task,
        total=total,
        correct=correct,
        components={
            **{name: values for name, values in batch.components.items() if not name.endswith(ANSWER)},
            **{name: values for name, (_, values) in made.items()},
        },
        weights=weights,
        mean=float(total[first].mean()) if len(first) else 0.0,
        length_weight=length,
        group_means={name: float(values[first].mean()) for name, (_, values) in made.items() if name != LENGTH_VALUE},
        memory=memory,
    )


LENGTH_VALUE = f"{LENGTH}.value"
"""Component of the length reward of k1.5; `reward/length_weight` says already that it is there."""


def _group_functions(reward: RewardConfig, length_weight: float) -> list[GroupFunction]:
    """Those of `reward.group`, after the length reward if it counts."""
    functions = load_group_functions(reward.group)
    if length_weight > 0:
        functions.insert(0, GroupFunction(name=LENGTH, weight=length_weight, visits=0, call=length_of_group))
    return functions


def _group_rewards(
    batch: TrainBatch | Claim, correct: npt.NDArray[np.bool_], functions: Sequence[GroupFunction], memory: Memory
) -> tuple[dict[str, tuple[float, Float64]], Memory]:
    """Weight and values [N] of each new component, and what is remembered from here on."""
    if not functions:
        return {}, memory
    visits = max(function.visits for function in functions)
    made: dict[str, tuple[float, Float64]] = {}
    kept: dict[str, History] = dict(memory)
    episode, first = batch.episode_of(), batch.first_branches()
    lengths = np.bincount(episode, weights=batch.count(Mask.GENERATED)).astype(np.int64)
    groups = batch.groups[first]
    for start in np.flatnonzero(np.diff(groups, prepend=-1)):
        members = np.arange(start, start + int((groups == groups[start]).sum()))
        view = _view(batch, correct, lengths, first, members)
        for function in functions:
            for name, values in function.components(view, kept.get(view.prompt_id, ())).items():
                whole = made.setdefault(name, (function.weight, np.zeros(len(episode))))[1]
                whole[np.isin(episode, members)] = values[episode[np.isin(episode, members)] - start]
        if visits:
            kept[view.prompt_id] = [*kept.get(view.prompt_id, ()), visit(view)][-visits:]
    return made, kept


def _view(
    batch: TrainBatch | Claim, correct: npt.NDArray[np.bool_], lengths: Any, first: Any, members: Any
) -> GroupView:
    rows = first[members]
    answers = {name for name in batch.components if name.endswith(ANSWER)}
    return GroupView(
        iteration=batch.iteration,
        prompt_id=batch.prompt_ids[rows[0]],
        rewards=batch.rewards[rows],
        components={name: values[rows] for name, values in batch.components.items() if name not in answers},
        answers={name.removesuffix(ANSWER): batch.components[name][rows] for name in sorted(answers)},
        correct=correct[rows],
        lengths=lengths[members],
        stops=batch.stops[rows],
    )
