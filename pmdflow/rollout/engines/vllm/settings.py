"""How vLLM is started: arguments, memory and environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal

import torch
from transformers import AutoConfig
from vllm import AsyncEngineArgs
from vllm.config import WeightTransferConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from pmdflow.config.model_size import measure_model
from pmdflow.config.schema import Config, LoraConfig
from pmdflow.learner.layers import heads
from pmdflow.rollout.engines.vllm.adapters import adapter_arguments
from pmdflow.rollout.engines.vllm.worker import BACKEND

MAX_SLOTS = 256
"""Most sequences at a time where the key-value cache decides."""
CPU_BLOCK_TOKENS = 32
"""Tokens of a cache block on a CPU: vLLM's default there, 128, would prefill that many again at each continuation."""
_SPECULATION: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "suffix": {"method": "suffix", "num_speculative_tokens": 16},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """What a vLLM engine is made for."""

    model_path: str
    max_length: int
    """Tokens of the longest sequence, prompt included; the model's positions bound it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    slots: int | None = None
    """Sequences held at a time; None lets the key-value cache decide."""
    threads: int = 1
    memory_share: float = 0.5
    """Of a GPU's memory, or on a CPU of the machine's, that weights and key-value cache may take."""
    tensor_parallel: int = 1
    """Ranks that one engine's weights are split over, each on its GPU, or on a CPU with `threads` of its own."""
    speculation: Literal["ngram", "suffix"] | None = None
    mean_length: int | None = None
    """Tokens of a sequence, prompt included, by which `slots: None` reckons; None is `max_length`."""
    sleeps: bool = False
    """Whether its memory is given to others in between: then vLLM allocates it so that it can."""
    lora: LoraConfig | None = None
    """Of the adapters that are published; None: whole weights are."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine."""
    timeout_s: float = 60.0
    """An engine process that is silent for this long has failed."""

    @classmethod
    def of(cls, config: Config) -> VllmSettings:
        """Take the settings out of a configuration."""
        rollout, data = config.rollout, config.data
        return cls(
            model_path=config.model.path,
            max_length=config.data.max_tokens + config.data.max_prompt_tokens,
            dtype=config.model.compute,
            slots=rollout.slots,
            threads=rollout.threads,
            memory_share=rollout.share,
            tensor_parallel=rollout.tensor_parallel,
            speculation=rollout.speculation,
            mean_length=_mean_answer(config) + data.max_prompt_tokens // 2,
            sleeps=config.cluster.colocate,
            lora=config.learner.lora,
            engine_args=rollout.engine_args,
            timeout_s=rollout.engine_timeout_s,
        )


def make_engine_args(settings: VllmSettings, *, seed: int) -> AsyncEngineArgs:
    """The arguments of vLLM's asynchronous engine; sets the environment that its processes inherit."""
    os.environ.update(
        OMP_NUM_THREADS=str(settings.threads), VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1"
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if current_platform.is_cpu():
        device = _cpu_arguments(settings)
    else:
        device = {"gpu_memory_utilization": settings.memory_share, "enable_sleep_mode": settings.sleeps}
    if settings.speculation is not None:
        device |= {
            "speculative_config": dict(_SPECULATION[settings.speculation]),
            "per_request_spec_decode_metrics": "summary",
        }
    if settings.lora is not None:
        device |= adapter_arguments(settings.lora)
    own: dict[str, Any] = dict(
        model=settings.model_path,
        dtype=settings.dtype,
        seed=seed,
        max_model_len=_max_length(settings),
        max_num_seqs=settings.slots or MAX_SLOTS,
        tensor_parallel_size=settings.tensor_parallel,
        # A worker in the engine's own process wherever one is enough.
        distributed_executor_backend=UniProcExecutor if settings.tensor_parallel == 1 else "mp",
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        skip_tokenizer_init=True,
        generation_config="vllm",
        disable_log_stats=False,  # a preemption is an event of a request, which comes with its statistics
        scheduling_policy="priority",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        worker_extension_cls="pmdflow.rollout.engines.vllm.worker.WorkerExtension",
        **device,
    )
    return AsyncEngineArgs(**own | _checked(settings.engine_args))


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    known = {argument.name for argument in fields(AsyncEngineArgs)}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]}?" if near else "remove it"
            raise ValueError(f"rollout.engine_args names {name}, which the installed vLLM does not have; {guess}")
    return dict(given)


def _mean_answer(config: Config) -> int:
    """Tokens that a trajectory of a claim has of the budget, at most its own limit."""
    scheduler, data = config.scheduler, config.data
    if scheduler.tokens_per_iteration == "auto":
        return max(data.max_tokens // 4, 1)
    trajectories = scheduler.groups_per_iteration * data.group_size
    return min(max(scheduler.tokens_per_iteration // trajectories, 1), data.max_tokens)


def _max_length(settings: VllmSettings) -> int:
    positions = getattr(AutoConfig.from_pretrained(settings.model_path), "max_position_embeddings", None)
    return min(settings.max_length, positions or settings.max_length)


def _cpu_arguments(settings: VllmSettings) -> dict[str, Any]:
    """Eager: a compiled graph would keep the packed weights of the first version, and takes a minute to make.

    Raises:
        ValueError: the heads have a size that vLLM's attention on a CPU does not have, or it should sleep there.
    """
    if settings.sleeps:
        raise ValueError("cluster.colocate: vLLM can give back a GPU's memory alone; use rollout.engine=transformers")
    config = AutoConfig.from_pretrained(settings.model_path)
    known = CPUAttentionBackend.get_supported_head_sizes()
    foreign = sorted({size for number, size in heads(config) if number and size not in known})
    if foreign:
        raise ValueError(
            f"{settings.model_path} has attention heads of size {foreign[0]}; on a CPU vLLM has sizes "
            f"{known}: use rollout.engine=transformers"
        )
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = int(settings.memory_share * machine / settings.tensor_parallel)
    size = measure_model(settings.model_path)
    if size is not None:
        number_bytes = torch.finfo(getattr(torch, settings.dtype)).bits // 8
        blocks = -(-_max_length(settings) // CPU_BLOCK_TOKENS)
        sequence_bytes = blocks * CPU_BLOCK_TOKENS * size.kv_numbers_per_token * number_bytes
        # One more, since vLLM keeps a block for itself.
        most = min(most - size.num_parameters * number_bytes, ((settings.slots or MAX_SLOTS) + 1) * sequence_bytes)
    return {"enforce_eager": True, "block_size": CPU_BLOCK_TOKENS, "kv_cache_memory_bytes": most}
