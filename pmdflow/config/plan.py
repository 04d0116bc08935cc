"""What a configuration means before anything starts: derived numbers, actors and their places, the dry run's report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pmdflow.config.combinations import BYTES_PER_TOKEN, PARTITION
from pmdflow.config.engine_problems import correction, lossy_arguments
from pmdflow.config.errors import dotted
from pmdflow.config.gpus import Gpus, gpu_shares, left_by_scorers
from pmdflow.config.load import Loaded, leaves
from pmdflow.config.memory import Footprint, MemoryPlan, Need, plan_memory, show_bytes
from pmdflow.config.schema import Config
from pmdflow.config.window import active_groups, most_tokens

SMALL_PARTITION_TAU = 0.2
"""Below this share of a reward of 1 the log-partition is nearly the maximum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """One kind of Ray actor."""

    role: str
    count: int
    cpus: int
    """CPUs that each reserves in Ray."""
    gpus: str
    """GPUs of each, in words."""


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
    memory: MemoryPlan | None
    """None when the model's size is unknown."""


def make_plan(
    config: Config, *, model: Footprint | None, gpus: Gpus | None = None, host_bytes: int | None = None
) -> Plan:
    """Derive all numbers of a configuration.

    Args:
        config: The configuration.
        model: Its model, None if unknown.
        gpus: What it runs on; None is processors alone, or not known.
        host_bytes: Memory of the one machine that runs it; None if that is another.

    Raises:
        LaunchError: the GPUs are too few for the engines and ranks.
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
        actors=tuple(_actors(config, gpus)),
        notes=tuple(_notes(config, store_bytes)),
        memory=None
        if model is None or (gpus and gpus.bytes_each is None)
        else plan_memory(config, model, gpus=gpus, host_bytes=host_bytes),
    )


def render_dry_run(
    loaded: Loaded,
    plan: Plan,
    *,
    model: Footprint | None = None,
    data: Sequence[tuple[str, str]] = (),
    advice: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Say what `up` would do: each setting with its origin, the actors, the derived numbers; starts nothing.

    Args:
        loaded: The configuration.
        plan: What follows from it.
        model: Its model, None if unknown.
        data: Name and numbers of every source of prompts.
        advice: What would run better.
        notes: What else is worth saying.
    """
    config = loaded.config
    settings = [
        (dotted(path), _show(value), loaded.origins[dotted(path)]) for path, value in leaves(config.model_dump())
    ]
    placement = [("actor", "count", "CPUs each", "GPUs each")]
    placement += [(actor.role, str(actor.count), str(actor.cpus), actor.gpus) for actor in plan.actors]
    cpus = sum(actor.count * actor.cpus for actor in plan.actors)
    total = f"{cpus} CPUs reserved in all, on {_where(config)}"
    sections = [
        ("configuration", [*_table(settings)]),
        ("placement", [*_table(placement), total]),
        ("memory", _memory(plan.memory) if plan.memory else []),
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


def _actors(config: Config, gpus: Gpus | None) -> Iterator[ActorPlan]:
    rollout, learner, reward = config.rollout, config.learner, config.reward
    split = rollout.tensor_parallel
    engine, rank = f"up to {split}", "up to 1"  # of a cluster that nobody has described
    if gpus is not None or config.cluster.address == "local":
        count = left_by_scorers(config, gpus.count if gpus else 0)
        shares = gpu_shares(
            count,
            actors=rollout.num_actors,
            ranks=learner.num_ranks,
            tensor_parallel=split,
            colocate=config.cluster.colocate,
        )
        engine, rank = ("0" if share == 0 else "shared" if share < 1 else f"{share:.0f}" for share in shares)
    yield ActorPlan(role="store", count=1, cpus=0, gpus="0")
    yield ActorPlan(role=f"reward, {reward.workers} subprocesses", count=reward.actors, cpus=0, gpus="0")
    yield ActorPlan(
        role="rollout",
        count=rollout.num_actors,
        cpus=rollout.threads * split,
        gpus=engine,
    )
    for name, scorer in learner.scorers_when("complete").items():
        yield ActorPlan(role=f"scorer {name}", count=scorer.actors, cpus=scorer.threads, gpus=f"{scorer.gpus:g}")
    yield ActorPlan(role="learner", count=learner.num_ranks, cpus=learner.threads, gpus=rank)


def _memory(plan: MemoryPlan) -> list[str]:
    """One line for each purpose of each role, and the sum of each beside what there is."""
    room = "of this machine's memory" if plan.gpus is None else f"of a GPU's {show_bytes(plan.gpus.room)}"
    if plan.in_turn:
        room += ", in turn with the other role"
    elif plan.shared:
        room += f", {show_bytes(plan.rank.total + plan.engine.total)} with the other role on it"
    rows: list[tuple[str, ...]] = []
    needs = [
        (plan.rank, f"each, {room}"),
        (plan.engine, f"each, {room}"),
        *((need, "each") for need in plan.scorers),
        (plan.host, "of all hosts together"),
    ]
    for need, of in needs:
        rows += [(need.role if index == 0 else "", *part) for index, part in enumerate(_parts(need))]
        rows.append(("" if need.parts else need.role, "all", f"{show_bytes(need.total)} {of}"))
    source = "processors alone" if plan.gpus is None else f"{plan.gpus.count} GPUs, {plan.gpus.source}"
    return [f"planned for {source}", *_table(rows)]


def _parts(need: Need) -> Iterator[tuple[str, str]]:
    yield from ((name, show_bytes(size)) for name, size in need.parts.items() if size)
    yield from ((name, "unknown: it could not be measured") for name in need.unknown)


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
    for name in lossy_arguments(rollout):
        yield (
            f"rollout.engine_args.{name} is {rollout.engine_args[name]}: the engine samples from another distribution "
            f"than the learner's; on against it: {correction(learner)}"
        )
    if rollout.engine == "simulated":
        yield "rollout.engine is simulated: tokens are random, the model learns nothing"
    if store_bytes > config.store.limit_bytes:
        yield (
            f"store.max_bytes ({config.store.max_bytes}) is below the {show_bytes(store_bytes)} that trajectories of "
            "full length would need: rollout may pause until a checkpoint frees room"
        )


def _numbers(plan: Plan, model: Footprint | None, path: str) -> list[tuple[str, str]]:
    size = f"{model.num_parameters:,} parameters" if model else f"unknown: no model found in {path}"
    return [
        ("model", size),
        ("active groups", f"{plan.active_groups:,} ({plan.active_trajectories:,} trajectories)"),
        ("trajectories an iteration", f"{plan.trajectories_per_iteration:,}"),
        *_budget_numbers(plan),
        ("full-length trajectory", f"spans at least {plan.versions_per_trajectory} policy versions"),
        ("worst-case staleness", plan.staleness),
        ("optimizer steps", f"{plan.optimizer_steps:,}"),
        ("store", f"at most about {show_bytes(plan.store_bytes)} of tokens"),
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


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
