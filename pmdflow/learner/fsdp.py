"""The policy as an FSDP2 module: built from a Hugging Face folder, sharded over the learner ranks."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from pmdflow.config.schema import LearnerConfig, LoraConfig
from pmdflow.errors import WaitTimeout
from pmdflow.learner.agreement import check_policy, failures_named, remedy
from pmdflow.learner.allocator import freed_at_once
from pmdflow.learner.context import Context, require_divisible
from pmdflow.learner.loading import load_model
from pmdflow.learner.lora import add_adapters, published_name, published_scale
from pmdflow.learner.policy import Policy
from pmdflow.learner.routing import Routing
from pmdflow.learner.slices import Part
from pmdflow.weights.file import NamedTensors, aligned
from pmdflow.weights.shares import Ranks

JOIN_TIMEOUT_S = 120.0
"""All ranks must have joined within this."""
COLLECTIVE_TIMEOUT_S = 1800.0
"""A rank that does not answer a collective for this long is dead: it covers the longest micro-batch and save."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def learner_device(rank: int) -> torch.device:
    """The accelerator of a rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def free_address(host: str) -> str:
    """`host:port` with a port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return f"{host}:{listener.getsockname()[1]}"


def join_ranks(master: str, *, rank: int, ranks: int, device: torch.device, replicas: int = 1) -> DeviceMesh:
    """Join the process group of all learner ranks.

    Args:
        master: `host:port` that rank 0 listens on; see `free_address`.
        rank: This rank.
        ranks: How many there are.
        device: Where the shards live; decides between gloo and NCCL.
        replicas: Copies of the model; the ranks of one are neighbours.

    Returns:
        A mesh over the ranks: `shard`, or `replicate` x `shard` if there are several replicas.

    Raises:
        ValueError: the address has no port.
        WaitTimeout: not all ranks joined in time.
    """
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"master is {master!r}; it must be host:port, for example 127.0.0.1:29500")
    deadline = timedelta(seconds=JOIN_TIMEOUT_S)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), ranks, is_master=rank == 0, timeout=deadline
        )
    except RuntimeError as error:  # Every error of torch.distributed derives from it.
        raise WaitTimeout(
            f"learner rank {rank} waited {JOIN_TIMEOUT_S:g} s at {master} for all {ranks} ranks: {error}"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def all_ranks(rank: int) -> Ranks:
    """The process group of all learner ranks, as a transport needs it."""

    def gather(own: Any) -> list[Any]:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return parts

    return Ranks(rank=rank, count=dist.get_world_size(), gather=gather)


@freed_at_once()
def build_policy(
    path: str, *, dtype: str, learner: LearnerConfig, mesh: DeviceMesh, context: Context | None = None
) -> Policy:
    """Read a Hugging Face folder and shard it: each decoder layer by itself, and the rest at the root.

    Master weights and gradient reduction are float32. Gradients are summed over ranks, not averaged: losses are
    divided by counts over all ranks already. Dropout is off.

    Args:
        path: Folder of the model.
        dtype: Compute type, `float32` or `bfloat16`.
        learner: Packing, adapters and what saves memory or time.
        mesh: The ranks, from `join_ranks`.
        context: Those that share each row; None: every rank has rows of its own.

    Raises:
        ValueError: the folder holds no causal language model, or not one that the settings fit, or one that they score
            otherwise than transformers does.
    """
    part = Part(rank=mesh.get_local_rank("shard"), ranks=mesh["shard"].size())
    model = load_model(path, packing=learner.packing, part=part)
    if learner.lora is not None:
        add_adapters(model, learner.lora)
    with failures_named(model, what="the learner", remedy=remedy(packing=learner.packing)):
        policy = Policy(model.eval())
    layers = apart(model)
    for layer in layers:
        if learner.activation_checkpointing is True:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    shard(policy, layers, dtype=DTYPES[dtype], cpu_offload=learner.cpu_offload, mesh=mesh)
    _check_on_first_rank(policy, packing=learner.packing, dtype=DTYPES[dtype])
    if context is not None:
        require_divisible(model.config, context.size)
        policy.context = context
    if learner.router_replay:
        policy.routing = Routing(model)
    for layer in layers if learner.compile else ():
        layer.compile(dynamic=True)
    return policy


def build_teacher(student: str, *, build: Callable[..., Policy], learner: LearnerConfig) -> Policy:
    """The model of `learner.teacher`, frozen and sharded as the policy is, which `build` does of a folder.

    Raises:
        ValueError: as `build_policy`, or it has other tokens than the `student` in that folder.
    """
    assert learner.teacher is not None
    sizes = {path: _num_tokens(path) for path in (student, learner.teacher)}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"learner.teacher {learner.teacher} has {sizes[learner.teacher]} tokens, the policy {sizes[student]}: a "
            "teacher scores the student's tokens, so give one with the same tokenizer"
        )
    plain = learner.model_copy(update={"lora": None, "compile": False, "router_replay": False})
    return build(learner.teacher, learner=plain).requires_grad_(requires_grad=False)


def _num_tokens(path: str) -> int:
    return int(AutoConfig.from_pretrained(path).get_text_config().vocab_size)


def _check_on_first_rank(policy: Policy, *, packing: bool, dtype: torch.dtype) -> None:
    """The self-check, which all ranks compute; what rank 0 finds, every rank refuses.

    Raises:
        ValueError: as `check_policy`, on every rank.
    """
    refusal: list[str | None] = [None]
    try:
        with failures_named(policy.model, what="the learner", remedy=remedy(packing=packing)):
            check_policy(policy, packing=packing, dtype=dtype)
    except ValueError as error:
        refusal[0] = str(error)
    assert isinstance(policy, FSDPModule)
    policy.reshard()  # the root stays whole after a forward pass, and an optimizer would get its whole parameters
    dist.broadcast_object_list(refusal, src=0, device=torch.device("cpu"))
    if refusal[0] is not None:
        raise ValueError(refusal[0])


def _outermost(module: nn.Module, names: set[str]) -> list[Any]:
    """The modules of these classes that are in no other of them."""
    if type(module).__name__ in names:
        return [module]
    return [found for child in module.children() for found in _outermost(child, names)]


def apart(model: nn.Module) -> list[Any]:
    """The modules to be sharded by themselves: those that a family wants whole, but not one that shares a weight."""

    def uses(module: nn.Module) -> Counter[int]:
        return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))

    everywhere = uses(model)
    whole = _outermost(model, set(getattr(model, "_no_split_modules", None) or ()))
    return [module for module in whole if all(count == everywhere[used] for used, count in uses(module).items())]


def shard(policy: Policy, layers: list[Any], *, dtype: torch.dtype, cpu_offload: bool, mesh: DeviceMesh) -> None:
    """Shard each of `layers`, and what is outside of them as the root, over the ranks of `mesh`."""
    offload = CPUOffloadPolicy() if cpu_offload and mesh.device_type != "cpu" else OffloadPolicy()
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)
    # The root's inputs are temperatures: they must stay float32.
    fully_shard(policy, mesh=mesh, mp_policy=replace(precision, cast_forward_inputs=False), offload_policy=offload)
    register_fsdp_forward_method(policy, "logits")
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def reshard(policy: Policy) -> None:
    """Let go of weights that a forward pass has gathered and that nothing has put away since: those of the root."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(policy: Policy, *, dtype: str, lora: LoraConfig | None = None) -> NamedTensors:
    """All weights by their Hugging Face names, each gathered when its turn comes; of tied names only the first.

    Every rank must go through all of them, in step: gathering is a collective.

    Args:
        policy: The sharded policy.
        dtype: Type of the floating-point tensors in a file; the values have that of the policy.
        lora: The settings if the policy has adapters: then only these are gathered.
    """
    sources: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in policy.state_dict(keep_vars=True).items():
        own = name.removeprefix("model.")
        published = own if lora is None else published_name(own)
        if id(tensor) not in seen and published is not None:
            sources[published] = tensor.detach()
        seen.add(id(tensor))
    wanted = {name: DTYPES[dtype] if own.is_floating_point() else own.dtype for name, own in sources.items()}

    def values() -> Iterator[Tensor]:
        for name in names:
            own = sources[name]
            whole = own.full_tensor() if isinstance(own, DTensor) else own
            scale = 1.0 if lora is None else published_scale(name, lora)
            yield whole * scale if scale != 1 else whole

    names = aligned(wanted)
    return NamedTensors(specs={name: (wanted[name], tuple(sources[name].shape)) for name in names}, values=values())


def full_state_dict(
    policy: Policy, *, dtype: str, rank: int, lora: LoraConfig | None = None
) -> dict[str, Tensor] | None:
    """What `gathered` gives, on the CPU at rank 0; None elsewhere. Every rank must call."""
    tensors = gathered(policy, dtype=dtype, lora=lora)
    # Copies: with one rank the gathered tensor may be the parameter itself, which the next step overwrites.
    whole = {
        name: value.to(wanted).to(device="cpu", copy=True)
        for (name, (wanted, _)), value in zip(tensors.specs.items(), tensors.values, strict=True)
        if rank == 0
    }
    return whole if rank == 0 else None


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to at most `max_norm` and return their norm over all shards before that."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    total = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return float(total)
