"""Where actors run: what each learner rank and rollout actor reserves in Ray, and on which node."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from pmdflow.config.gpus import gpu_shares, left_by_scorers
from pmdflow.config.schema import Config
from pmdflow.config.scorers import ScorerConfig
from pmdflow.errors import LaunchError

ActorOptions: TypeAlias = dict[str, Any]
"""What Ray calls the options of an actor: resources, threads, strategy."""

ROLE_SHARE = 0.001
"""What an actor takes of the resource that marks the nodes of its role: as good as nothing."""
PLACEMENT_TIMEOUT_S = 60
"""Ray takes whole seconds here."""


def place_learners(config: Config) -> list[ActorOptions]:
    """Reserve a place for each rank, as options of its actor; the ranks of a replica are on one node if they fit.

    Raises:
        LaunchError: Ray has too few CPUs or GPUs.
    """
    learner = config.learner
    _, gpus = _gpu_shares(config)
    role = _role(config, "learner")
    bundle = _bundle(learner.threads, gpus, role)
    shards = learner.num_ranks // learner.replicas
    places = []
    for replica in range(learner.replicas):
        what = f"{shards} learner ranks of replica {replica}"
        group = _reserve([bundle] * shards, "PACK", what, "lower learner.ranks or learner.threads")
        places += [_options(learner.threads, gpus, role, group, index) for index in range(shards)]
    return places


def place_rollouts(config: Config) -> list[ActorOptions]:
    """The options of each rollout actor's Ray actor.

    The ranks of a tensor-parallel engine are processes of its actor: what all of them need is reserved as one bundle,
    which is on one node, and which the actor's successor takes over.

    Raises:
        LaunchError: Ray has no node with enough CPUs or GPUs for an engine.
    """
    rollout = config.rollout
    gpus, _ = _gpu_shares(config)
    cpus, role = rollout.threads * rollout.tensor_parallel, _role(config, "rollout")
    if rollout.tensor_parallel == 1:
        place = {"num_cpus": cpus, "num_gpus": gpus, "resources": role, "scheduling_strategy": "SPREAD"}
        return [place] * rollout.num_actors
    remedy = "lower rollout.actors, rollout.tensor_parallel or rollout.threads"
    places = []
    for actor in range(rollout.num_actors):
        what = f"the {rollout.tensor_parallel} ranks of rollout actor {actor}, which must be on one node,"
        group = _reserve([_bundle(cpus, gpus, role)], "STRICT_PACK", what, remedy)
        places.append(_options(cpus, gpus, role, group, 0))
    return places


def another_place(config: Config, first: ActorOptions) -> ActorOptions:
    """A place like that of the first rollout actor, for one more; returns before Ray has found a node for it."""
    rollout = config.rollout
    if rollout.tensor_parallel == 1:
        return first
    reserved = first["num_cpus"], first["num_gpus"], first["resources"]
    group: PlacementGroup = placement_group([_bundle(*reserved)], strategy="STRICT_PACK")
    return _options(*reserved, group, 0)


def place_rewards(config: Config) -> list[ActorOptions]:
    """The options of each reward actor's Ray actor: one node after the other, since they reserve nothing there."""
    nodes = sorted(str(node["NodeID"]) for node in ray.nodes() if node["Alive"])
    return [
        {"scheduling_strategy": NodeAffinitySchedulingStrategy(nodes[index % len(nodes)], soft=True)}
        for index in range(config.reward.actors)
    ]


def place_scorer(scorer: ScorerConfig) -> ActorOptions:
    """The options of each Ray actor of a scorer."""
    return {"num_cpus": scorer.threads, "num_gpus": scorer.gpus, "scheduling_strategy": "SPREAD"}


def needs(place: ActorOptions) -> str:
    """What an actor reserves, for messages."""
    on = "".join(f" on a node that has the resource {name}" for name in place.get("resources", {}))
    return f"{place.get('num_cpus', 0):g} CPUs and {place.get('num_gpus', 0):g} GPUs{on}"


def free_resources() -> str:
    """CPUs and GPUs that nobody has reserved, for messages."""
    free = ray.available_resources()
    return ", ".join(f"{free.get(name, 0.0):g} {name}s" for name in ("CPU", "GPU"))


def _gpu_shares(config: Config) -> tuple[float, float]:
    return gpu_shares(
        left_by_scorers(config, int(ray.cluster_resources().get("GPU", 0))),
        actors=config.rollout.num_actors,
        ranks=config.learner.num_ranks,
        tensor_parallel=config.rollout.tensor_parallel,
        colocate=config.cluster.colocate,
    )


def _role(config: Config, role: Literal["learner", "rollout"]) -> dict[str, float]:
    """What marks the nodes of a role, as a resource that an actor takes as good as nothing of.

    Raises:
        LaunchError: no node has it.
    """
    name = config.cluster.roles.get(role)
    if name is None:
        return {}
    if name not in ray.cluster_resources():
        raise LaunchError(
            f"cluster.roles.{role} is {name}, and no node has that resource",
            hint=f"start Ray with --resources='{{\"{name}\": 1}}' on those that are to have it, or leave the role out",
        )
    return {name: ROLE_SHARE}


def _bundle(cpus: int, gpus: float, role: dict[str, float]) -> dict[str, float]:
    return {"CPU": float(cpus), **({"GPU": gpus} if gpus else {}), **role}


def _reserve(bundles: list[dict[str, float]], strategy: str, what: str, remedy: str) -> PlacementGroup:
    group: PlacementGroup = placement_group(bundles, strategy=strategy)
    if not group.wait(PLACEMENT_TIMEOUT_S):
        raise LaunchError(
            f"Ray found no place for {what} with {bundles[0]} each in {PLACEMENT_TIMEOUT_S} s; "
            f"free: {ray.available_resources()}",
            hint=remedy,
        )
    return group


def _options(cpus: int, gpus: float, role: dict[str, float], group: PlacementGroup, index: int) -> ActorOptions:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": role, "scheduling_strategy": strategy}
