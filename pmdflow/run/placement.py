"""Where actors run: what each learner rank and rollout actor reserves in Ray, and on which node."""

from __future__ import annotations

from typing import Any, TypeAlias

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from pmdflow.config.gpus import gpu_shares
from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError

ActorOptions: TypeAlias = dict[str, Any]
"""What Ray calls the options of an actor: resources, threads, strategy."""

PLACEMENT_TIMEOUT_S = 60
"""Ray takes whole seconds here."""


def place_learners(config: Config) -> list[ActorOptions]:
    """Reserve a place for each rank, as options of its actor; the ranks of a replica are on one node if they fit.

    Raises:
        LaunchError: Ray has too few CPUs or GPUs.
    """
    learner = config.learner
    _, gpus = _gpu_shares(config)
    bundle = _bundle(learner.threads, gpus)
    shards = learner.num_ranks // learner.replicas
    places = []
    for replica in range(learner.replicas):
        what = f"{shards} learner ranks of replica {replica}"
        group = _reserve([bundle] * shards, "PACK", what, "lower learner.ranks or learner.threads")
        places += [_options(learner.threads, gpus, group, index) for index in range(shards)]
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
    cpus = rollout.threads * rollout.tensor_parallel
    if rollout.tensor_parallel == 1:
        return [{"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}] * rollout.num_actors
    remedy = "lower rollout.actors, rollout.tensor_parallel or rollout.threads"
    places = []
    for actor in range(rollout.num_actors):
        what = f"the {rollout.tensor_parallel} ranks of rollout actor {actor}, which must be on one node,"
        group = _reserve([_bundle(cpus, gpus)], "STRICT_PACK", what, remedy)
        places.append(_options(cpus, gpus, group, 0))
    return places


def place_rewards(config: Config) -> list[ActorOptions]:
    """The options of each reward actor's Ray actor: one node after the other, since they reserve nothing there."""
    nodes = sorted(str(node["NodeID"]) for node in ray.nodes() if node["Alive"])
    return [
        {"scheduling_strategy": NodeAffinitySchedulingStrategy(nodes[index % len(nodes)], soft=True)}
        for index in range(config.reward.actors)
    ]


def needs(place: ActorOptions) -> str:
    """What an actor reserves, for messages."""
    return f"{place.get('num_cpus', 0):g} CPUs and {place.get('num_gpus', 0):g} GPUs"


def _gpu_shares(config: Config) -> tuple[float, float]:
    return gpu_shares(
        int(ray.cluster_resources().get("GPU", 0)),
        actors=config.rollout.num_actors,
        ranks=config.learner.num_ranks,
        tensor_parallel=config.rollout.tensor_parallel,
        colocate=config.cluster.colocate,
    )


def _bundle(cpus: int, gpus: float) -> dict[str, float]:
    return {"CPU": float(cpus), **({"GPU": gpus} if gpus else {})}


def _reserve(bundles: list[dict[str, float]], strategy: str, what: str, remedy: str) -> PlacementGroup:
    group: PlacementGroup = placement_group(bundles, strategy=strategy)
    if not group.wait(PLACEMENT_TIMEOUT_S):
        raise LaunchError(
            f"Ray found no place for {what} with {bundles[0]} each in {PLACEMENT_TIMEOUT_S} s; "
            f"free: {ray.available_resources()}",
            hint=remedy,
        )
    return group


def _options(cpus: int, gpus: float, group: PlacementGroup, index: int) -> ActorOptions:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}
