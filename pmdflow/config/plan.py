"""What a configuration means before anything starts: derived numbers, actors and their places, the dry run's report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pmdflow.config.combinations import BYTES_PER_TOKEN, PARTITION
from pmdflow.config.errors import dotted
from pmdflow.config.load import Loaded, leaves
from pmdflow.config.model_size import ModelSize, measure_model
from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.config.window import active_groups, most_tokens

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_MASTER_BYTES = 16
"""Float32 master weight, gradient and Adam's two moments of one parameter."""
SMALL_PARTITION_TAU = 0.2
"""Below this share of a reward of 1 the log-partition is nearly the maximum."""
_LOGITS_BYTES = 3 * 4 * (1 << 26)
"""The most that the log-probs of a micro-batch hold: three float32 tensors of `token_scores.LOGITS_PER_CHUNK`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """One kind of Ray actor."""

    role: str
    count: int
    cpus: int
    """CPUs that each reserves in Ray."""
    gpus: int
    """Most GPUs of each: whole ones where there are enough, else an equal part."""
    memory_bytes: int | None
    """Estimated model memory of each; None when the model's size is unknown, 0 for actors without a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Numbers that follow from a configuration."""

    active_groups: int
    """Most groups admitted and not yet trained."""
    active_trajectories: int
    trajectories_per_iteration: int
    tokens_per_iteration: int
    """Most tokens generated under one policy version."""
    automatic_budget_s: float | None
    """Seconds whose tokens are the budget once a rate is measured; None if the budget is a number."""
    versions_per_trajectory: int
    """Fewest policy versions that a trajectory of `data.max_tokens` tokens spans."""
    staleness: str
    """The worst case, in words."""
    optimizer_steps: int
    store_bytes: int
    """Most bytes of tokens in the store: all active trajectories, and those that a kept checkpoint may need again."""
    actors: tuple[ActorPlan, ...]
    notes: tuple[str, ...]
    """Settings that are allowed but probably not meant."""


def make_plan(config: Config, *, model: ModelSize | None) -> Plan:
    """Derive all numbers of a configuration.

    Args:
        config: The configuration.
        model: Size of its model, None if unknown.
    """
    scheduler, data, learner = config.scheduler, config.data, config.learner
    trajectories = scheduler.groups_per_iteration * data.group_size
    window = active_groups(
        groups_per_iteration=scheduler.groups_per_iteration,
        lookahead=scheduler.lookahead,
        extra_groups=scheduler.extra_groups,
    )
    kept = learner.checkpoint_every * learner.keep_checkpoints * trajectories
    store_bytes = (window * data.group_size + kept) * data.max_tokens * BYTES_PER_TOKEN
    return Plan(
        active_groups=window,
        active_trajectories=window * data.group_size,
        trajectories_per_iteration=trajectories,
        tokens_per_iteration=most_tokens(config),
        automatic_budget_s=scheduler.iteration_s,
        versions_per_trajectory=_versions_per_trajectory(config),
        staleness=_staleness(config),
        optimizer_steps=config.run.iterations * learner.steps_per_iteration,
        store_bytes=store_bytes,
        actors=tuple(_actors(config, model)),
        notes=tuple(_notes(config, store_bytes)),
    )


def render_dry_run(
    loaded: Loaded,
    *,
    data: Sequence[tuple[str, str]] = (),
    advice: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Say what `up` would do: each setting with its origin, the actors, the derived numbers; starts nothing.

    Args:
        loaded: The configuration.
        data: Name and numbers of every source of prompts.
        advice: What would run better.
        notes: What else is worth saying.
    """
    config = loaded.config
    model = measure_model(config.model.path)
    plan = make_plan(config, model=model)
    settings = [
        (dotted(path), _show(value), loaded.origins[dotted(path)]) for path, value in leaves(config.model_dump())
    ]
    placement = [("actor", "count", "CPUs each", "GPUs each", "model memory each")]
    placement += [
        (
            actor.role,
            str(actor.count),
            str(actor.cpus),
            f"up to {actor.gpus}" if actor.gpus else "0",
            _show_memory(actor.memory_bytes),
        )
        for actor in plan.actors
    ]
    cpus = sum(actor.count * actor.cpus for actor in plan.actors)
    total = f"{cpus} CPUs reserved in all, on {_where(config)}"
    sections = [
        ("configuration", [*_table(settings)]),
        ("placement", [*_table(placement), total]),
        ("derived", [*_table(_numbers(plan, model, config.model.path))]),
        ("data", [*_table(data)] if data else []),
        ("advice", advice),
        ("notes", [*plan.notes, *notes]),
    ]
    body = "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections if lines)
    return f"{body}\n\ndry run of {loaded.path}: nothing was started"


def _versions_per_trajectory(config: Config) -> int:
    segment = config.rollout.tokens_per_segment or config.data.max_tokens
    return -(-config.data.max_tokens // segment)


def _staleness(config: Config) -> str:
    limit, lookahead = config.scheduler.max_staleness, config.scheduler.lookahead
    if limit is None:
        return "unbounded: tokens of any age have a gradient"
    if limit == 0:
        return "0: only tokens of the newest version have a gradient"
    ahead = f"; rollout runs at most {lookahead} ahead" if lookahead else "; rollout and training alternate"
    if config.scheduler.versions is not None:
        ahead += f"; each trajectory is of one version, {config.scheduler.versions} of them at a time"
    return f"at most {limit} versions for a token with a gradient{ahead}"


def _actors(config: Config, model: ModelSize | None) -> Iterator[ActorPlan]:
    rollout, learner, reward = config.rollout, config.learner, config.reward
    engine_bytes = _engine_bytes(config, model)
    rank_bytes = _rank_bytes(config, model)
    yield ActorPlan(role="store", count=1, cpus=0, gpus=0, memory_bytes=0)
    yield ActorPlan(role=f"reward, {reward.workers} subprocesses", count=reward.actors, cpus=0, gpus=0, memory_bytes=0)
    yield ActorPlan(
        role="rollout",
        count=rollout.actors,
        cpus=rollout.threads * rollout.tensor_parallel,
        gpus=rollout.tensor_parallel,
        memory_bytes=engine_bytes,
    )
    yield ActorPlan(role="learner", count=learner.ranks, cpus=learner.threads, gpus=1, memory_bytes=rank_bytes)


def _engine_bytes(config: Config, model: ModelSize | None) -> int | None:
    """Weights and full KV caches of one engine."""
    if config.rollout.engine == "simulated":
        return 0
    if model is None:
        return None
    cache = (config.rollout.slots or DEFAULT_SLOTS) * config.data.max_tokens * model.kv_numbers_per_token
    return (model.num_parameters + cache) * _DTYPE_BYTES[config.model.dtype]


def _rank_bytes(config: Config, model: ModelSize | None) -> int | None:
    """Sharded master weights, gradients and moments, and logits; activations and adapters left out."""
    if model is None:
        return None
    learner = config.learner
    logits = min(learner.tokens_per_microbatch * model.vocab_size * 3 * 4, _LOGITS_BYTES)
    held = _DTYPE_BYTES["float32"] if learner.lora else _MASTER_BYTES
    teacher = None if learner.teacher is None else measure_model(learner.teacher)
    taught = 0 if teacher is None else teacher.num_parameters * _DTYPE_BYTES["float32"]
    return (model.num_parameters * held + taught) * learner.replicas // learner.ranks + logits


def _notes(config: Config, store_bytes: int) -> Iterator[str]:
    scheduler, learner, rollout = config.scheduler, config.learner, config.rollout
    oldest = _versions_per_trajectory(config) - 1
    if learner.steps_per_iteration == 1 and learner.algorithm == "pmd_mean":
        yield "learner.tau has no effect: with one step an iteration the policy is still the reference policy"
    if learner.algorithm == "opefo" and (learner.steps_per_iteration > 1 or scheduler.lookahead > 0):
        yield (
            "learner.algorithm opefo balances entropy for one step on fresh rollouts: with "
            f"steps_per_iteration {learner.steps_per_iteration} and lookahead {scheduler.lookahead} it does not"
        )
    if learner.algorithm in PARTITION and learner.tau < SMALL_PARTITION_TAU:
        yield (
            f"learner.tau ({learner.tau}) is small for {learner.algorithm}: beside a right answer wrong ones get "
            "nearly the whole reward as penalty and right ones nearly nothing; with rewards of 0 and 1, start at 1"
        )
    if scheduler.max_staleness is not None and oldest > scheduler.max_staleness:
        yield (
            f"a trajectory of data.max_tokens is {oldest} versions old at its end: its first tokens will have no "
            f"gradient; raise scheduler.max_staleness ({scheduler.max_staleness}) or rollout.tokens_per_segment"
        )
    if rollout.tokens_per_segment is not None and rollout.tokens_per_segment >= config.data.max_tokens:
        yield "rollout.tokens_per_segment has no effect: it is not below data.max_tokens"
    if rollout.engine == "simulated":
        yield "rollout.engine is simulated: tokens are random, the model learns nothing"
    if store_bytes > config.store.limit_bytes:
        yield (
            f"store.max_bytes ({config.store.max_bytes}) is below the {_show_bytes(store_bytes)} that trajectories of "
            "full length would need: rollout may pause until a checkpoint frees room"
        )


def _numbers(plan: Plan, model: ModelSize | None, path: str) -> list[tuple[str, str]]:
    size = f"{model.num_parameters:,} parameters" if model else f"unknown: no model found in {path}"
    return [
        ("model", size),
        ("active groups", f"{plan.active_groups:,} ({plan.active_trajectories:,} trajectories)"),
        ("trajectories an iteration", f"{plan.trajectories_per_iteration:,}"),
        *_budget_numbers(plan),
        ("full-length trajectory", f"spans at least {plan.versions_per_trajectory} policy versions"),
        ("worst-case staleness", plan.staleness),
        ("optimizer steps", f"{plan.optimizer_steps:,}"),
        ("store", f"at most about {_show_bytes(plan.store_bytes)} of tokens"),
        ("Ray actors", f"{sum(actor.count for actor in plan.actors)}"),
    ]


def _budget_numbers(plan: Plan) -> Iterator[tuple[str, str]]:
    most, trajectories = plan.tokens_per_iteration, plan.trajectories_per_iteration
    if plan.automatic_budget_s is None:
        yield ("tokens an iteration", f"at most {most:,}")
        yield ("tokens a trajectory", f"{most / trajectories:,.0f} of the budget on average")
    else:
        rate = f"what rollout generates in {plan.automatic_budget_s:g} s at the rate of the newest iterations"
        yield ("tokens an iteration", f"{rate}, {trajectories:,} to {most:,}; {most:,} until a rate is measured")


def _where(config: Config) -> str:
    if config.cluster.address == "local":
        return f"this machine, which has {os.cpu_count()}"
    return f"the Ray cluster at {config.cluster.address}"


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _show_memory(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "unknown"
    return _show_bytes(num_bytes) if num_bytes else "-"


def _show_bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.3g} TiB"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
