"""The policy as an FSDP2 module: built from a Hugging Face folder, sharded over the learner ranks."""

from __future__ import annotations

import logging
import socket
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from pmdflow.errors import WaitTimeout

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 120.0
"""All ranks must have joined within this."""
COLLECTIVE_TIMEOUT_S = 1800.0
"""A rank that does not answer a collective for this long is dead: it covers the longest micro-batch and save."""
LOGITS_PER_CHUNK = 1 << 26
"""Float32 logits held at a time (256 MiB)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TokenScores(NamedTuple):
    """What the policy says of each given token, in float32."""

    logprobs: Tensor
    """[P]"""
    entropies: Tensor
    """Entropy in nats of the distribution that the token was drawn from [P]."""


class Policy(nn.Module):
    """Log-probs of given tokens under a causal language model, without ever holding all logits.

    The output head runs over chunks of positions, and its logits are recomputed in the backward pass. A model that
    does more to its logits than a linear map is called whole instead.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._plain_head = _has_plain_head(model)

    def forward(
        self,
        tokens: Tensor,
        attention: Tensor,
        positions: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        *,
        entropy: bool = False,
    ) -> Tensor:
        """Log-probs [P] in float32 of `targets`, of logits / temperature; with `entropy` log-probs, entropies [P, 2].

        Args:
            tokens: [B, W], right-padded.
            attention: bool [B, W], False at padding.
            positions: Indices into the flattened [B * W] whose logits predict the targets [P].
            targets: Token ids [P].
            temperatures: [P]
            entropy: Whether to add the entropy of the distribution over all tokens.
        """
        if not self._plain_head:
            logits = self.model(input_ids=tokens, attention_mask=attention, use_cache=False).logits
            return _token_logprobs(logits.flatten(0, 1)[positions], targets, temperatures, entropy)
        decoder = self.model.get_decoder()
        hidden = decoder(input_ids=tokens, attention_mask=attention, use_cache=False).last_hidden_state
        chosen = hidden.flatten(0, 1)[positions]
        size = max(1, LOGITS_PER_CHUNK // self.model.config.get_text_config().vocab_size)
        chunks = zip(chosen.split(size), targets.split(size), temperatures.split(size), strict=True)
        return torch.cat([checkpoint(self._head_logprobs, *chunk, entropy, use_reentrant=False) for chunk in chunks])

    def _head_logprobs(self, hidden: Tensor, targets: Tensor, temperatures: Tensor, entropy: bool) -> Tensor:
        return _token_logprobs(self.model.get_output_embeddings()(hidden), targets, temperatures, entropy)


def _token_logprobs(logits: Tensor, targets: Tensor, temperatures: Tensor, entropy: bool) -> Tensor:
    scaled = logits.float() / temperatures[:, None]
    total = scaled.logsumexp(1)
    logprobs = scaled.gather(1, targets[:, None]).squeeze(1) - total
    if not entropy:
        return logprobs
    # log Z - E[logit]; a logit of -inf has probability 0 and no part in the mean.
    parts = (scaled - total[:, None]).exp() * scaled
    return torch.stack([logprobs, total - torch.where(scaled.isneginf(), torch.zeros_like(parts), parts).sum(1)], 1)


@torch.no_grad()
def _has_plain_head(model: Any) -> bool:
    """Whether the logits are the output embedding of the decoder's last hidden state and nothing more."""
    # Distinct tokens, compared bit for bit: a padding token's hidden state may be 0, and a soft cap is nearly linear
    # where logits are small. A false alarm costs memory only.
    tokens = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    plain = torch.equal(model.get_output_embeddings()(hidden), model(input_ids=tokens, use_cache=False).logits)
    if not plain:
        logger.info("%s does more to its logits than a linear map: its log-probs are not chunked", type(model).__name__)
    return plain


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


def join_ranks(master: str, *, rank: int, ranks: int, device: torch.device) -> DeviceMesh:
    """Join the process group of all learner ranks.

    Args:
        master: `host:port` that rank 0 listens on; see `free_address`.
        rank: This rank.
        ranks: How many there are.
        device: Where the shards live; decides between gloo and NCCL.

    Returns:
        A one-dimensional mesh over the ranks.

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
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))


def build_policy(path: str, *, dtype: str, mesh: DeviceMesh) -> Policy:
    """Read a Hugging Face folder and shard it: each decoder layer by itself, and the rest at the root.

    Master weights and gradient reduction are float32. Gradients are summed over ranks, not averaged: losses are
    divided by counts over all ranks already. Dropout is off.

    Args:
        path: Folder of the model.
        dtype: Compute type, `float32` or `bfloat16`.
        mesh: The ranks.

    Raises:
        ValueError: the folder holds no causal language model.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    except OSError as error:
        raise ValueError(f"model.path {path} is no Hugging Face model folder with weights: {error}") from error
    policy = Policy(model.eval())
    compute = DTYPES[dtype]
    layer = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    # The root's inputs are temperatures: they must stay float32.
    root = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=layer)
    fully_shard(policy, mesh=mesh, mp_policy=root)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return policy


def full_state_dict(policy: Policy, *, dtype: str, rank: int) -> dict[str, Tensor] | None:
    """Gather all weights by their Hugging Face names; of tied names only the first. Every rank must call.

    Args:
        policy: The sharded policy.
        dtype: Type of the gathered floating-point tensors.
        rank: This rank.

    Returns:
        The weights on the CPU at rank 0, None elsewhere.
    """
    gathered: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in policy.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = tensor.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if rank == 0:
            wanted = DTYPES[dtype] if whole.is_floating_point() else whole.dtype
            # A copy: with one rank the gathered tensor may be the parameter itself, which the next step overwrites.
            gathered[name.removeprefix("model.")] = whole.to(device="cpu", dtype=wanted, copy=True)
    return gathered if rank == 0 else None


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to at most `max_norm` and return their norm over all shards before that."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    total = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return float(total)
