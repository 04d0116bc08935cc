"""Settings of the learner, of sampling and of the reward that contradict each other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmdflow.config.schema import DataConfig, EvalConfig, LearnerConfig, RewardConfig, RolloutConfig

CLIPPED = ("token_pmd", "ctpo", "grpo", "gspo")
"""Algorithms with a clipping band."""
PARTITION = ("pmd_partition", "boltzmann_pmd")
"""Algorithms with the log-partition baseline."""
ALGORITHM_NAMES = ("pmd_mean", *PARTITION, "weighted_sft", *CLIPPED)
"""What `learner.algorithm` may be, besides an import path."""


def learner_problems(learner: LearnerConfig) -> Iterator[str]:
    """Each as `key ...: why; remedy`."""
    yield from _algorithm_problems(learner)
    low, high = learner.keep_groups_above, learner.keep_groups_below
    if low is not None and high is not None and low >= high:
        yield (
            f"learner.keep_groups_above ({low}) is not below learner.keep_groups_below ({high}): "
            "no group could be trained; widen the interval"
        )
    if learner.reset_warmup_steps and not learner.reset_optimizer:
        yield (
            f"learner.reset_warmup_steps is {learner.reset_warmup_steps} while learner.reset_optimizer is false: there "
            "is no reset to warm up from; set reset_optimizer, or use warmup_steps"
        )
    corrects = "importance_weights" if learner.importance_weights != "none" else "veto" if learner.veto else ""
    if corrects and learner.anchor == "behavior":
        yield (
            f"learner.{corrects} is set while learner.anchor is behavior: the ratio that it corrects is in the loss "
            "already; set anchor to reference"
        )
    if learner.importance_weights != "none" and learner.algorithm == "ctpo":
        yield (
            "learner.importance_weights is set while learner.algorithm is ctpo, whose ratio runs from the generating "
            "engine already; set importance_weights to none"
        )


def _algorithm_problems(learner: LearnerConfig) -> Iterator[str]:
    name = learner.algorithm
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return
    if name not in ALGORITHM_NAMES:
        near = difflib.get_close_matches(name, ALGORITHM_NAMES, n=1)
        guess = f"did you mean {near[0]}? or " if near else ""
        yield (
            f"learner.algorithm is {name!r}, which is not known; {guess}use one of {', '.join(ALGORITHM_NAMES)}, or an "
            "import path package.module:name"
        )
        return
    if name not in CLIPPED and (learner.clip_low is not None or learner.clip_high is not None):
        yield (
            f"learner.clip_low or learner.clip_high is set, but learner.algorithm {name} does not clip; remove it, "
            f"or use one of {', '.join(CLIPPED)}"
        )
    if name in ("grpo", "gspo") and learner.clip_low is not None and learner.clip_low >= 1:
        yield (
            f"learner.clip_low ({learner.clip_low}) is not below 1: {name} clips the ratio at 1 - clip_low; lower it"
        )
    if name not in PARTITION and learner.partition_floor is not None:
        yield (
            f"learner.partition_floor is set, but learner.algorithm {name} has no partition baseline; remove it, or "
            f"use one of {', '.join(PARTITION)}"
        )


def sampling_problems(rollout: RolloutConfig, reward: RewardConfig) -> Iterator[str]:
    """Each as `key ...: why; remedy`."""
    if (rollout.final_temperature is None) != (rollout.temperature_iterations is None):
        yield (
            "rollout.final_temperature and rollout.temperature_iterations make one schedule, and one of them is null; "
            "set both, or neither"
        )
    if rollout.engine != "vllm":
        given = {"tensor_parallel": rollout.tensor_parallel > 1, "speculation": rollout.speculation is not None}
        for name in (name for name, is_given in given.items() if is_given):
            yield (
                f"rollout.{name} is {getattr(rollout, name)}, which rollout.engine {rollout.engine} cannot do; set "
                "engine to vllm"
            )
    if reward.length_warmup_iterations and reward.length_weight == 0:
        yield (
            f"reward.length_warmup_iterations is {reward.length_warmup_iterations} while reward.length_weight is 0: "
            "there is nothing to warm up; set length_weight"
        )
    for name in ("invalid", "cut_reward", "repetition_penalty"):
        value = getattr(reward, name)
        if value is not None and abs(value) > reward.max_abs:
            yield f"reward.{name} ({value:g}) is beyond reward.max_abs ({reward.max_abs:g}); lower it"
    if reward.repetition_penalty and rollout.repetition is None:
        yield (
            f"reward.repetition_penalty is {reward.repetition_penalty} while rollout.repetition is null: no "
            "trajectory is ended for repetition; set repetition, {} takes the defaults"
        )


def evaluation_problems(evaluation: EvalConfig, data: DataConfig, rollout: RolloutConfig) -> Iterator[str]:
    """Each as `key ...: why; remedy`."""
    if evaluation.min_tokens > data.max_tokens:
        yield (
            f"eval.min_tokens ({evaluation.min_tokens}) is above data.max_tokens ({data.max_tokens}): no answer could "
            "end by itself; lower min_tokens"
        )
    if evaluation.stop_repetition and rollout.repetition is None:
        yield (
            "eval.stop_repetition is true while rollout.repetition is null: there is nothing to stop by; set "
            "repetition, {} takes the defaults"
        )
