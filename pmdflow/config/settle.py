"""What `auto` and null become on the GPUs that a run is for: engine, type, split of the GPUs, recomputing, shares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec

from pmdflow.config.gpus import Gpus
from pmdflow.config.memory import Footprint, plan_memory, rank_need
from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError

OWN_SHARE = 0.9
"""Of a GPU that an engine has for itself: vLLM's own default."""
HALF = 0.5
"""Of a machine without a GPU, or of a shared GPU while the size of the model is not known."""
LEARNER_PART = 4
"""One GPU in so many is a learner rank's where its memory asks for no more: generation takes most of the time."""
SPARE = 0.1
"""Share of a GPU that is left free where there is a choice."""


def settle(config: Config, *, gpus: Gpus | None, model: Footprint | None = None, alone: bool = False) -> Config:
    """Decide everything that the file leaves open.

    `engine: auto` is vLLM where it is installed; `dtype: auto` is bfloat16 on GPUs. `actors: auto` and `ranks: auto`
    use every GPU: a quarter of them are ranks, or as many as the model's states need, and the rest engines; where
    there is one GPU, or the ranks need them all, or with `cluster.colocate`, each has a rank and an engine. Without a
    GPU both are one. Layers are computed again in the backward pass (`activation_checkpointing: auto`) only where a
    rank does not fit otherwise.

    Args:
        config: As it is written.
        gpus: Those of the run; None is processors alone, or not known.
        model: Its model; None leaves memory out.
        alone: There is one engine, and no learner.

    Example:
        >>> settle(config, gpus=Gpus(count=8, bytes_each=80 << 30, source="")).rollout.num_actors  # doctest: +SKIP
        6
    """
    engine, dtype = config.rollout.engine, config.model.dtype
    needs_vllm = config.rollout.tensor_parallel > 1 or config.rollout.speculation is not None
    if engine == "auto":
        engine = "vllm" if find_spec("vllm") or needs_vllm else "transformers"
    if dtype == "auto":
        dtype = "float32" if gpus is None else "bfloat16"
    settled = config.model_copy(
        update={
            "model": config.model.model_copy(update={"dtype": dtype}),
            "rollout": config.rollout.model_copy(update={"engine": engine}),
        }
    )
    if alone:
        share = config.rollout.memory_share or (OWN_SHARE if gpus else HALF)
        rollout = settled.rollout.model_copy(update={"actors": 1, "memory_share": share})
        cluster = config.cluster.model_copy(update={"colocate": False})
        return settled.model_copy(update={"rollout": rollout, "cluster": cluster})
    tried = list(_choices(settled, gpus, model))
    fits = (choice for choice in tried if model is None or gpus is None or _fits(choice, model, gpus))
    return next(fits, tried[-1])  # of what fits nowhere, the plan says why


def _choices(config: Config, gpus: Gpus | None, model: Footprint | None) -> Iterator[Config]:
    """The splits of the GPUs, those with fewer ranks first, each without and with recomputing."""
    again = config.learner.activation_checkpointing
    for actors, ranks in _splits(config, gpus.count if gpus else 0):
        for recompute in (False, True) if again == "auto" and gpus else (again is True,):
            learner = config.learner.model_copy(update={"ranks": ranks, "activation_checkpointing": recompute})
            rollout = config.rollout.model_copy(update={"actors": actors})
            choice = config.model_copy(update={"learner": learner, "rollout": rollout})
            if rollout.memory_share is None:
                share = _share(choice, gpus, model)
                choice = choice.model_copy(update={"rollout": rollout.model_copy(update={"memory_share": share})})
            yield choice


def _splits(config: Config, gpus: int) -> Iterator[tuple[int, int]]:
    """Rollout actors and learner ranks; what the file states stands, and every GPU is used where it does not."""
    split = config.rollout.tensor_parallel
    replicas = math.lcm(config.learner.replicas, config.learner.context_parallel)
    given_actors, given_ranks = config.rollout.actors, config.learner.ranks
    if config.cluster.colocate:
        stated = [number for number in (given_actors, given_ranks) if number != "auto"]
        pairs = stated[0] if stated else max(gpus, 1)
        yield pairs, pairs
        return
    if given_ranks != "auto":
        choices = [given_ranks]
    elif given_actors != "auto" and gpus:
        left = gpus - given_actors * split
        choices = [max(replicas, left - left % replicas)] if left > 0 else [gpus]
    else:
        least = max(replicas, gpus // LEARNER_PART, 1)
        choices = list(range(-(-least // replicas) * replicas, max(gpus, least) + 1, replicas))
    for ranks in choices:
        if given_actors != "auto":
            yield given_actors, ranks
        elif gpus > ranks and (gpus - ranks) // split:
            yield (gpus - ranks) // split, ranks
        elif gpus == ranks or len(choices) == 1:
            yield max(gpus, 1) if split == 1 and gpus == ranks else 1, ranks


def _share(config: Config, gpus: Gpus | None, model: Footprint | None) -> float:
    """Part of a GPU that an engine takes: most of its own, or of a shared one what the rank leaves."""
    engines = config.rollout.num_actors * config.rollout.tensor_parallel
    if gpus is None:
        return HALF
    if gpus.count >= engines + config.learner.num_ranks or config.cluster.colocate:
        return OWN_SHARE
    if model is None:
        return HALF
    rest = 1 - SPARE - rank_need(config, model, on_gpu=True).total / gpus.room
    return max(0.05, int(100 * rest) / 100)


def _fits(config: Config, model: Footprint, gpus: Gpus) -> bool:
    """Whether it fits with something to spare: a plan is up to 15 % off."""
    try:
        plan = plan_memory(config, model, gpus=gpus)
    except LaunchError:
        return False
    return not plan.problems and ((plan.shared and not plan.in_turn) or plan.rank.total <= (1 - SPARE) * gpus.room)
