"""What a run needs of the memory of its GPUs and of its host, by role and by purpose, before anything starts.

A learner rank is planned at the worst of four moments: the end of the forward pass, the backward pass of a decoder
layer, that of what lies outside of all layers, and the optimizer step. `tests/learner/test_memory_plan.py` holds the
plan beside `FSDPMemTracker` of torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pmdflow.config.gpus import Gpus, gpu_shares, left_by_scorers
from pmdflow.config.model_size import measure_model
from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.errors import LaunchError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MASTER_BYTES = 4
"""Of a float32 number: master weights, their gradients, and each of Adam's two moments."""
LOGITS_BYTES = 4 * (1 << 26)
"""One float32 chunk of logits (`token_scores.LOGITS_PER_CHUNK`), of which the head holds three."""
CONTEXT_BYTES = 2 << 30
"""**choice**: what CUDA, NCCL, cuBLAS and a cut-up allocator take of a GPU in each process; not measured yet."""
ENGINE_BYTES = 3 << 30
"""**choice**: what vLLM takes besides weights and cache: CUDA graphs and the activations of a prefill."""


def held_versions(config: Config) -> int:
    """Published versions that a node holds at a time: those in use, and the next one on its way."""
    return (config.scheduler.versions or 1) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What memory estimates need to know of a model."""

    num_parameters: int
    layer_parameters: int
    """Of the largest module that is sharded by itself, a decoder layer."""
    root_parameters: int
    """Outside of all those: embeddings, output head, last norm."""
    head_parameters: int
    """Of the output head, tied or not: vocabulary x hidden size."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    kv_numbers_per_token: int
    """Numbers that one token adds to a sequence's cache, over all layers."""
    activation_bytes: float | None
    """Bytes a token that all layers keep for the backward pass at the compute type; None: could not be measured."""
    teacher: Footprint | None = None
    """Of the model of `learner.teacher`; None: there is none, or it could not be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one process of a role, or a host, holds at its worst moment, by purpose."""

    role: str
    count: int
    parts: dict[str, int]
    unknown: tuple[str, ...] = ()
    """Purposes whose size is not known; they are not in the sum."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """All roles, and what does not fit."""

    rank: Need
    engine: Need
    host: Need
    gpus: Gpus | None
    shared: bool
    """An engine and a rank live on the same GPU."""
    in_turn: bool
    """They have it one after the other: while one works, the other's memory is on the host."""
    scorers: tuple[Need, ...] = ()
    """Those in actors of their own."""
    problems: tuple[str, ...] = field(default=())
    """What cannot fit, each with what would."""


def plan_memory(config: Config, model: Footprint, *, gpus: Gpus | None, host_bytes: int | None = None) -> MemoryPlan:
    """Plan the memory of a run.

    Args:
        config: The configuration.
        model: Its model.
        gpus: Of all nodes; None plans for processors alone.
        host_bytes: Memory of the one machine that runs it; None where that is another machine.

    Raises:
        LaunchError: the GPUs are too few for the engines and ranks, or the ranks cannot be divided as they should.
    """
    learner, rollout = config.learner, config.rollout
    count = left_by_scorers(config, gpus.count if gpus else 0)
    actors, ranks = rollout.num_actors, learner.num_ranks
    in_turn = config.cluster.colocate and count > 0
    gpu_shares(count, actors=actors, ranks=ranks, tensor_parallel=rollout.tensor_parallel, colocate=in_turn)
    unit = math.lcm(learner.replicas, learner.context_parallel)
    if ranks % unit:
        raise LaunchError(
            f"learner.ranks is {ranks}, which learner.replicas ({learner.replicas}) and learner.context_parallel "
            f"({learner.context_parallel}) must divide",
            hint=f"change these, or set learner.ranks to a multiple of {unit}",
        )
    shared = 0 < count < actors * rollout.tensor_parallel + ranks
    rank = rank_need(config, model, on_gpu=gpus is not None)
    engine = engine_need(config, model, gpus=gpus)
    scorers = tuple(_scorer_needs(config))
    host = _host_need(config, model, rank, engine, on_gpu=gpus is not None)
    plan = MemoryPlan(
        rank=rank, engine=engine, host=_with(host, scorers, config), scorers=scorers, gpus=gpus, shared=shared,
        in_turn=in_turn,
    )  # fmt: skip
    return replace(plan, problems=tuple(_problems(config, model, plan, host_bytes)))


def rank_need(config: Config, model: Footprint, *, on_gpu: bool) -> Need:
    """What a learner rank holds at its worst moment."""
    learner = config.learner
    number = DTYPE_BYTES[config.model.compute]
    shards = learner.num_ranks // learner.replicas
    shard = -(-model.num_parameters // shards) * MASTER_BYTES
    trained = 0 if learner.lora else shard
    kept = {"master weights": shard, "moments": 2 * trained, "gradients": trained}
    if learner.cpu_offload and on_gpu:
        kept = {}
    moments = _moments(config, model, number)
    if model.teacher is not None:
        moments.append(_teacher_pass(config, model.teacher, number))
    if not learner.cpu_offload:
        moments.append({"optimizer temporaries": trained})
    worst = max(moments, key=lambda parts: sum(parts.values()))
    context = {"CUDA context": CONTEXT_BYTES} if on_gpu else {}
    unknown: tuple[str, ...] = () if model.activation_bytes is not None else ("activations",)
    if model.teacher is not None:
        kept["teacher"] = -(-model.teacher.num_parameters // shards) * MASTER_BYTES
    elif learner.teacher is not None:
        unknown += ("teacher",)
    unknown += tuple(f"scorer {name}" for name in learner.scorers_when("claim"))  # they may train what they hold
    return Need(role="learner rank", count=learner.num_ranks, parts={**kept, **worst, **context}, unknown=unknown)


def _scorer_needs(config: Config) -> Iterator[Need]:
    """What each actor of a scorer holds: its model in float32, and the logits of a forward pass."""
    for name, scorer in config.learner.scorers_when("complete").items():
        role, size = f"scorer {name}", measure_model(scorer.model or config.model.path)
        context = {"CUDA context": CONTEXT_BYTES} if scorer.gpus else {}
        if size is None:
            yield Need(role=role, count=scorer.actors, parts=context, unknown=("weights",))
            continue
        weights = size.num_parameters * MASTER_BYTES
        logits = min(3 * LOGITS_BYTES, 3 * 4 * config.learner.tokens_per_microbatch * size.vocab_size)
        yield Need(role=role, count=scorer.actors, parts={"weights": weights, "head": logits, **context})


def _with(host: Need, scorers: Sequence[Need], config: Config) -> Need:
    """The host with the scorers that are on processors."""
    given = config.learner.scorers
    own = {need.role: need.total * need.count for need in scorers if not given[need.role.removeprefix("scorer ")].gpus}
    return replace(host, parts={**host.parts, **own})


def _moments(config: Config, model: Footprint, number: int) -> list[dict[str, int]]:
    """What comes on top of a rank's shard in forward, backward of a layer, and backward of the rest."""
    learner = config.learner
    tokens = -(-learner.tokens_per_microbatch // learner.context_parallel)
    everything = int((model.activation_bytes or 0) * tokens)
    kept, again = everything, 0
    if learner.activation_checkpointing is True:
        kept, again = model.num_layers * model.hidden_size * number * tokens, everything // max(model.num_layers, 1)
    gathered = (model.root_parameters + 2 * model.layer_parameters) * number  # one in use, and the next one
    hidden = 2 * tokens * model.hidden_size * number
    logits = min(3 * LOGITS_BYTES, 3 * 4 * tokens * model.vocab_size)
    head = 0 if learner.lora else model.head_parameters
    reduced = 0 if learner.lora else number + MASTER_BYTES  # a whole gradient, and its float32 copy to be scattered
    backward = again + hidden  # a layer computed again, and the gradients that run through it
    forward = {
        "activations": kept,
        "gathered weights": gathered,
        "head": logits + hidden + head * (MASTER_BYTES + number),
    }
    layer = {
        "activations": kept + backward,
        "gathered weights": gathered,
        "head": head * number,
        "gradient buffers": 2 * model.layer_parameters * reduced,
    }
    root = {
        "activations": hidden,
        "gathered weights": gathered,
        "gradient buffers": model.root_parameters * reduced,
    }
    return [forward, layer, root]


def _teacher_pass(config: Config, teacher: Footprint, number: int) -> dict[str, int]:
    """What a frozen model's forward pass, which keeps nothing for later, holds beside its shard."""
    tokens = -(-config.learner.tokens_per_microbatch // config.learner.context_parallel)
    return {
        "activations": int((teacher.activation_bytes or 0) * tokens) // max(teacher.num_layers, 1),
        "gathered weights": (teacher.root_parameters + 2 * teacher.layer_parameters) * number,
        "head": min(3 * LOGITS_BYTES, 3 * 4 * tokens * teacher.vocab_size) + 2 * tokens * teacher.hidden_size * number,
    }


def engine_need(config: Config, model: Footprint, *, gpus: Gpus | None) -> Need:
    """What one process of a rollout engine holds: its share of the weights, and its cache of keys and values."""
    rollout, data = config.rollout, config.data
    if rollout.engine == "simulated":
        return Need(role="rollout engine", count=rollout.num_actors, parts={})
    number, split = DTYPE_BYTES[config.model.compute], rollout.tensor_parallel
    weights = model.num_parameters * number // split
    longest = data.max_tokens + data.max_prompt_tokens
    sequence = longest * model.kv_numbers_per_token * number // split
    cache = (rollout.slots or DEFAULT_SLOTS) * sequence
    context = {"CUDA context": CONTEXT_BYTES} if gpus else {}
    if rollout.engine == "vllm" and gpus:
        context = {"graphs and prefill": ENGINE_BYTES}
        room = int(rollout.share * gpus.room) - weights - ENGINE_BYTES
        cache = max(room, sequence)  # it takes what its share leaves, and at least one sequence must fit
    return Need(
        role="rollout engine",
        count=rollout.num_actors * split,
        parts={"weights": weights, "key-value cache": cache, **context},
    )


def _host_need(config: Config, model: Footprint, rank: Need, engine: Need, *, on_gpu: bool) -> Need:
    """What the host of everything holds; of several nodes, what all of them hold together."""
    learner = config.learner
    whole = model.num_parameters * DTYPE_BYTES[config.model.compute]
    published = 0 if config.rollout.engine == "simulated" or learner.lora else whole
    parts = {"published weights, on each node": held_versions(config) * published}  # its engines map the same files
    if config.cluster.colocate:
        parts |= _asleep(config, rank, engine)
    if on_gpu and learner.cpu_offload:
        shard = -(-model.num_parameters // (learner.num_ranks // learner.replicas)) * MASTER_BYTES
        parts["master weights, moments, gradients"] = 4 * shard * learner.num_ranks
    if not on_gpu:
        parts |= {"learner ranks": rank.total * rank.count, "rollout engines": engine.total * engine.count}
    return Need(role="host", count=1, parts=parts)


def _asleep(config: Config, rank: Need, engine: Need) -> dict[str, int]:
    """Host memory into which engines and ranks put what they hold while the others work; kept for the next time."""
    states = sum(rank.parts.get(name, 0) for name in ("master weights", "moments"))
    return {
        "sleeping learner": states * rank.count,
        "sleeping engines": engine.parts.get("weights", 0) * engine.count,
    }


def _problems(config: Config, model: Footprint, plan: MemoryPlan, host_bytes: int | None) -> list[str]:
    problems = []
    if host_bytes is not None and plan.host.total > host_bytes:
        need, has = show_bytes(plan.host.total), show_bytes(host_bytes)
        remedy = "choose a smaller model, or plan for another machine: cluster.gpus=8x80GiB"
        problems.append(f"the run needs {need} of this machine's {has} beside its GPUs; {remedy}")
    if plan.gpus is None:
        return [problem.replace(" beside its GPUs", "") for problem in problems]
    room = plan.gpus.room
    beside = CONTEXT_BYTES if plan.in_turn else plan.engine.total if plan.shared else 0
    alone = room - beside
    share = config.rollout.share if config.rollout.engine == "vllm" else 1
    if plan.engine.total > min(room * share, room - (CONTEXT_BYTES if plan.in_turn else 0)):
        problems.append(_engine_problem(config, plan))
    elif plan.rank.total > alone:
        other = f" beside the engine's {show_bytes(beside)}" if plan.shared else ""
        problems.append(
            f"a learner rank needs {show_bytes(plan.rank.total)}{other}, a GPU has {show_bytes(room)}; "
            f"{_proposal(config, model, alone)}"
        )
    return problems


def _engine_problem(config: Config, plan: MemoryPlan) -> str:
    assert plan.gpus is not None
    need, split = show_bytes(plan.engine.total), config.rollout.tensor_parallel
    if config.rollout.engine != "vllm":
        return (
            f"a rollout engine needs {need} for its weights and its sequences at full length, a GPU has "
            f"{show_bytes(plan.gpus.room)}; lower rollout.slots or data.max_tokens, or set rollout.engine to vllm"
        )
    has = show_bytes(config.rollout.share * plan.gpus.room)
    return (
        f"a rollout engine needs {need} for its weights and one sequence of full length, its rollout.memory_share "
        f"({config.rollout.share:g}) of a GPU is {has}; raise rollout.tensor_parallel ({split}), or leave it more room"
    )


def _proposal(config: Config, model: Footprint, room: int) -> str:
    """The first of a few changes, each on top of those before, with which a rank fits."""
    learner = config.learner
    longest = config.data.max_tokens + config.data.max_prompt_tokens
    steps: list[tuple[str, bool | int]] = []
    if learner.activation_checkpointing is not True:
        steps.append(("activation_checkpointing", True))
    if learner.tokens_per_microbatch > longest:
        steps.append(("tokens_per_microbatch", longest))
    steps += [("ranks", times * learner.num_ranks) for times in (2, 4, 8, 16)]
    for size in (learner.context_parallel, *((2, 4, 8) if learner.packing else ())):
        changed: dict[str, bool | int] = {}
        for name, value in [("context_parallel", size), *steps]:
            changed[name] = value
            tried = learner.model_copy(update=changed)
            need = rank_need(config.model_copy(update={"learner": tried}), model, on_gpu=True)
            if tried.num_ranks % size == 0 and need.total <= room:
                new = {key: given for key, given in changed.items() if given != getattr(learner, key)}
                return "it would fit with " + " ".join(f"learner.{key}={given}".lower() for key, given in new.items())
    return "none of more ranks, smaller or shared rows and activation checkpointing makes it fit: use larger GPUs"


def show_bytes(num_bytes: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.3g} TiB"
