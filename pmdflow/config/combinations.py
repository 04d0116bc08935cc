"""Settings that are right one by one and contradict each other: every refusal that needs more than one key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pmdflow.config.device_problems import device_problems
from pmdflow.config.engine_problems import engine_problems
from pmdflow.config.imports import IMPORT_PATH
from pmdflow.config.routing_problems import routing_problems
from pmdflow.config.scorers import scorer_problems
from pmdflow.config.sinks import SETTINGS
from pmdflow.config.source_problems import source_problems
from pmdflow.config.weights import weights_problems

if TYPE_CHECKING:
    from pmdflow.config.scheduling import SchedulerConfig
    from pmdflow.config.schema import Config, EvalConfig, LearnerConfig, RewardConfig
    from pmdflow.config.sequences import RolloutConfig
    from pmdflow.config.sinks import SinkConfig
    from pmdflow.config.sources import DataConfig

CLIPPED = ("token_pmd", "ctpo", "grpo", "gspo")
"""Algorithms with a clipping band."""
PARTITION = ("pmd_partition", "boltzmann_pmd")
"""Algorithms with the log-partition baseline."""
TAUGHT = ("opd", "vopd")
"""Those that learn from `learner.teacher`."""
SHAPED = ("ucpo", "a_nsr", "gdpo", "opefo", "gigpo", *TAUGHT)
"""Policy mirror descent on credit that other papers shape."""
ALGORITHM_NAMES = ("pmd_mean", *PARTITION, "weighted_sft", *CLIPPED, *SHAPED)
"""What `learner.algorithm` may be, besides an import path."""
BYTES_PER_TOKEN = 8
"""Bytes of one generated token in the store: an int32 id and a float32 log-prob."""


def combination_problems(config: Config, *, recorded: bool) -> Iterator[str]:
    """Everything that contradicts itself in a configuration whose keys are right one by one.

    Each is one line `key ...: why; remedy`; the first key of it that the file names is where the error is shown. What
    earlier releases started is not refused where it is `recorded` in a run directory.
    """
    yield from _staleness_problems(config)
    if not recorded:
        yield from _segment_problems(config)
    yield from _budget_problems(config.scheduler)
    yield from _group_problems(config)
    yield from _version_problems(config)
    yield from weights_problems(config)
    yield from _extra_problems(config)
    yield from _refill_problems(config)
    yield from _room_problems(config)
    yield from _learner_problems(config.learner)
    yield from routing_problems(config)
    yield from scorer_problems(config)
    yield from _sampling_problems(config.rollout, config.reward)
    yield from engine_problems(config)
    yield from device_problems(config)
    yield from _evaluation_problems(config.eval, config.data, config.rollout)
    yield from _sink_problems(config.metrics.sinks)
    yield from _agent_problems(config)
    yield from source_problems(config.data, config.eval)


def _agent_problems(config: Config) -> Iterator[str]:
    if config.agents is None:
        return
    if config.environment is not None:
        yield "agents and environment are both set: a trajectory talks to one of them; remove the other"
    if config.cluster.address != "local" and config.agents.host in ("127.0.0.1", "localhost", "::1"):
        yield (
            f"agents.host is {config.agents.host} while cluster.address is {config.cluster.address}: programs on other "
            "machines would not reach the gateway; set it to an address of the machine that runs `pmdflow up`, or to "
            "0.0.0.0"  # noqa: S104
        )


def _staleness_problems(config: Config) -> Iterator[str]:
    scheduler, rollout = config.scheduler, config.rollout
    if scheduler.max_staleness is not None and scheduler.max_staleness < scheduler.lookahead:
        yield (
            f"scheduler.max_staleness ({scheduler.max_staleness}) is below scheduler.lookahead "
            f"({scheduler.lookahead}): tokens would be masked that the lookahead allows; raise max_staleness"
        )
    if rollout.tokens_per_segment is not None and scheduler.max_staleness == 0:
        yield (
            "scheduler.max_staleness is 0 while rollout.tokens_per_segment is set: every continued trajectory "
            "would lose its gradient; set max_staleness to null (Kimi k1.5) or to 1 or more"
        )
    if rollout.tokens_per_segment is not None and rollout.on_new_weights == "finish":
        yield (
            "rollout.on_new_weights is finish while rollout.tokens_per_segment is set: a trajectory cannot both "
            "stay on one version and be continued under the next; choose keep_kv or reprefill"
        )


def _budget_problems(scheduler: SchedulerConfig) -> Iterator[str]:
    if scheduler.tokens_per_iteration == "auto" and scheduler.iteration_s is None:
        yield (
            "scheduler.tokens_per_iteration is auto while scheduler.iteration_s is null: a budget is measured by the "
            "time that it should last; set iteration_s, or a number of tokens"
        )
    if scheduler.tokens_per_iteration != "auto" and scheduler.iteration_s is not None:
        yield (
            f"scheduler.iteration_s is set while scheduler.tokens_per_iteration is {scheduler.tokens_per_iteration}: "
            "the time of an iteration follows from one of them; set tokens_per_iteration to auto, or leave iteration_s "
            "out"
        )


def _version_problems(config: Config) -> Iterator[str]:
    """What contradicts one policy version a trajectory."""
    scheduler, rollout, versions = config.scheduler, config.rollout, config.scheduler.versions
    if versions is None:
        return
    if scheduler.lookahead == 0:
        yield (
            f"scheduler.versions is {versions} while scheduler.lookahead is 0: rollout and training alternate, so that "
            "one version is served at a time anyway; set versions to null, or lookahead to 1 or more"
        )
    if rollout.tokens_per_segment is not None:
        yield (
            f"scheduler.versions is {versions} while rollout.tokens_per_segment is {rollout.tokens_per_segment}: what "
            "a version leaves unfinished is never continued by another; set tokens_per_segment to null"
        )
    if rollout.on_new_weights == "finish":
        yield (
            f"scheduler.versions is {versions} while rollout.on_new_weights is finish: a rollout actor that is needed "
            "for another version gives back what it holds, and does not finish it; leave on_new_weights out"
        )
    if scheduler.max_staleness is not None and scheduler.max_staleness < versions - 1:
        yield (
            f"scheduler.max_staleness ({scheduler.max_staleness}) is below scheduler.versions - 1 ({versions - 1}): "
            "what the oldest version finishes would be masked whole; raise max_staleness, or lower versions"
        )


def _extra_problems(config: Config) -> Iterator[str]:
    scheduler = config.scheduler
    if scheduler.extra_groups and scheduler.lookahead:
        yield (
            f"scheduler.extra_groups is {scheduler.extra_groups} while scheduler.lookahead is {scheduler.lookahead}: "
            "rollout that runs ahead has more groups in flight already; set extra_groups to 0, or lookahead to 0"
        )
    if scheduler.extra_groups and scheduler.max_staleness == 0:
        yield (
            f"scheduler.max_staleness is 0 while scheduler.extra_groups is {scheduler.extra_groups}: what is left for "
            "the next iteration would lose the gradient of what it has; set max_staleness to null, or to 1 or more"
        )


def _refill_problems(config: Config) -> Iterator[str]:
    learner = config.learner
    if not config.scheduler.refill:
        return
    if learner.keep_groups_above is None and learner.keep_groups_below is None:
        yield (
            "scheduler.refill is true while learner.keep_groups_above and keep_groups_below are null: no group would "
            "be left out; set keep_groups_above to 0 and keep_groups_below to 1 for rewards of 0 and 1"
        )
    if config.reward.cut_reward is not None or config.reward.repetition_penalty:
        yield (
            "scheduler.refill judges groups by their stored rewards, which reward.cut_reward and "
            "reward.repetition_penalty change in training; set refill to false, or leave both out"
        )


def _segment_problems(config: Config) -> Iterator[str]:
    """Where rollout runs ahead, a budget a version makes long answers wait for the learner's clock."""
    segment, ahead = config.rollout.tokens_per_segment, config.scheduler.lookahead
    if segment is None or ahead == 0:
        return
    most = config.data.max_tokens
    if -(-most // segment) > ahead + 1:
        yield (
            f"rollout.tokens_per_segment ({segment}) lets an answer of data.max_tokens ({most}) grow only with "
            f"{-(-most // segment)} policy versions, more than the {ahead + 1} of scheduler.lookahead ({ahead}): long "
            "answers would finish in cohorts and batches alternate between long and short ones; set it to null, new "
            f"weights end segments already, or to {-(-most // (ahead + 1))} or more"
        )


def _group_problems(config: Config) -> Iterator[str]:
    scheduler, data = config.scheduler, config.data
    if config.learner.steps_per_iteration > scheduler.groups_per_iteration:
        yield (
            f"learner.steps_per_iteration ({config.learner.steps_per_iteration}) is above "
            f"scheduler.groups_per_iteration ({scheduler.groups_per_iteration}): a group is never split; "
            "lower steps_per_iteration"
        )
    if scheduler.window is not None and scheduler.window < scheduler.groups_per_iteration:
        yield (
            f"scheduler.window ({scheduler.window}) is below scheduler.groups_per_iteration "
            f"({scheduler.groups_per_iteration}): no claim could be whole; raise window, or set it to null"
        )
    if scheduler.min_group_size > data.group_size:
        yield (
            f"scheduler.min_group_size ({scheduler.min_group_size}) is above data.group_size "
            f"({data.group_size}): no group could ever be trained; lower min_group_size"
        )
    straggler = scheduler.straggler
    if straggler is not None and not scheduler.min_group_size <= straggler.members < data.group_size:
        yield (
            f"scheduler.straggler.members ({straggler.members}) is not from scheduler.min_group_size "
            f"({scheduler.min_group_size}) up to below data.group_size ({data.group_size}): the group would be too "
            "small, or nobody late; change it, or set straggler to null"
        )


def _room_problems(config: Config) -> Iterator[str]:
    data, store = config.data, config.store
    if config.rollout.lease_ttl_s <= config.rollout.flush_interval_s:
        yield (
            f"rollout.lease_ttl_s ({config.rollout.lease_ttl_s}) is not above rollout.flush_interval_s "
            f"({config.rollout.flush_interval_s}): healthy workers would lose their leases; raise lease_ttl_s"
        )
    if data.max_tokens >= config.learner.tokens_per_microbatch:
        yield (
            f"learner.tokens_per_microbatch ({config.learner.tokens_per_microbatch}) has no room for a trajectory of "
            f"data.max_tokens ({data.max_tokens}) and its prompt; raise tokens_per_microbatch"
        )
    group_bytes = data.group_size * data.max_tokens * BYTES_PER_TOKEN
    if group_bytes > store.limit_bytes:
        yield (
            f"store.max_bytes ({store.max_bytes}) has no room for one group of data.group_size x data.max_tokens "
            f"tokens ({group_bytes} bytes): nothing could be admitted; raise max_bytes"
        )


def _learner_problems(learner: LearnerConfig) -> Iterator[str]:
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
    yield from _schedule_problems(learner)
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


def _schedule_problems(learner: LearnerConfig) -> Iterator[str]:
    steps = learner.lr_decay_steps
    if (learner.lr_schedule == "constant") != (steps is None):
        yield (
            f"learner.lr_schedule is {learner.lr_schedule} while learner.lr_decay_steps is {steps}: a rate that falls "
            "needs a length, and a constant one has none; set both, or neither"
        )
    elif steps is not None and steps <= learner.warmup_steps:
        yield (
            f"learner.lr_decay_steps ({steps}) is not above learner.warmup_steps ({learner.warmup_steps}), which it "
            "includes: nothing is left for the schedule; raise it"
        )


def _algorithm_problems(learner: LearnerConfig) -> Iterator[str]:
    name = learner.algorithm
    if re.fullmatch(IMPORT_PATH, name):
        return
    if name not in ALGORITHM_NAMES:
        near = difflib.get_close_matches(name, ALGORITHM_NAMES, n=1)
        guess = f"did you mean {near[0]}? or " if near else ""
        yield (
            f"learner.algorithm is {name!r}, which is not known; {guess}use one of {', '.join(ALGORITHM_NAMES)}, or an "
            "import path package.module:name"
        )
        return
    taught = learner.teacher is not None or "teacher" in learner.scorers
    if name in TAUGHT and not taught:
        yield (
            f"learner.teacher is {learner.teacher} while learner.algorithm is {name}: {' and '.join(TAUGHT)} learn "
            "from a teacher; set it, or learner.scorers.teacher"
        )
    if name not in TAUGHT and learner.teacher is not None:
        yield (
            f"learner.teacher is {learner.teacher} while learner.algorithm is {name}: {' and '.join(TAUGHT)} learn "
            "from a teacher, the others do not; leave it out"
        )
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


def _sampling_problems(rollout: RolloutConfig, reward: RewardConfig) -> Iterator[str]:
    if (rollout.final_temperature is None) != (rollout.temperature_iterations is None):
        yield (
            "rollout.final_temperature and rollout.temperature_iterations make one schedule, and one of them is null; "
            "set both, or neither"
        )
    if rollout.engine not in ("vllm", "auto"):
        given = {
            "tensor_parallel": rollout.tensor_parallel > 1,
            "speculation": rollout.speculation is not None,
            "engine_args": bool(rollout.engine_args),
        }
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


def _sink_problems(sinks: Sequence[SinkConfig]) -> Iterator[str]:
    names = [sink.name for sink in sinks]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"metrics.sinks names {name} {names.count(name)} times: one process follows a run for it; name it once"
    for sink in sinks:
        for key, field in type(sink).model_fields.items():
            if key not in ("name", *SETTINGS[sink.name]) and getattr(sink, key) != field.default:
                owners = " and ".join(name for name, keys in SETTINGS.items() if key in keys)
                yield f"metrics.sinks sets {key} of {sink.name}, which has none: it belongs to {owners}; remove it"


def _evaluation_problems(evaluation: EvalConfig, data: DataConfig, rollout: RolloutConfig) -> Iterator[str]:
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
