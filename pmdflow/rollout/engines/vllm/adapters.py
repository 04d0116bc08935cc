"""Adapters in vLLM: a single one that every request is generated with, replaced in place by each new version.

A running request goes on with it, as it does with weights that are loaded anew; what is cached is told apart by salt.
"""

from __future__ import annotations

from typing import Any, get_args

from safetensors.torch import load_file
from vllm.config.lora import MaxLoRARanks
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from pmdflow.config.schema import LoraConfig
from pmdflow.weights.lora import rank_of

REQUEST = LoRARequest(lora_name="published", lora_int_id=1, lora_path="in memory")
"""The adapter of every request; `replace_adapters` gives its id what is published."""


def adapter_arguments(lora: LoraConfig) -> dict[str, Any]:
    """Arguments of vLLM's engine that make room for the adapters of a run.

    Raises:
        ValueError: vLLM has no room for their rank.
    """
    ranks = sorted(get_args(MaxLoRARanks))
    if lora.rank > ranks[-1]:
        raise ValueError(
            f"learner.lora.rank is {lora.rank}, vLLM takes at most {ranks[-1]}: lower it, or use "
            "rollout.engine=transformers"
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(rank for rank in ranks if rank >= lora.rank)}


def begin_adapters(manager: Any) -> None:
    """Let requests be generated with adapters that change nothing; in a worker, before the first of them."""
    manager.add_dummy_lora(REQUEST, rank=manager.get_dummy_lora_warmup_rank(1))
    manager._adapter_manager.activate_adapter(REQUEST.lora_int_id)


def replace_adapters(manager: Any, path: str) -> None:
    """Let requests be generated with the adapters of a safetensors file; in a worker, while it is paused.

    Args:
        manager: The worker's `LRUCacheWorkerLoRAManager`.
        path: The file, as the learner publishes it.

    Raises:
        ValueError: vLLM has no layer for one of them, and would leave it out.
    """
    adapters, config = manager._adapter_manager, manager.lora_config
    tensors = load_file(path)
    rank = rank_of(tensors)
    mapper = getattr(adapters.model, "hf_to_vllm_mapper", None)
    published = LoRAModel.from_lora_tensors(
        REQUEST.lora_int_id,
        tensors,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # their scale is in B
        device="cpu",
        dtype=config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    known = {part for name in adapters.modules for part in adapters.packed_modules.get(name, [name])}
    if unknown := sorted(published.loras.keys() - known):
        raise ValueError(f"vLLM applies no adapters to {unknown}; leave them out of learner.lora.targets")
    adapters.remove_adapter(published.id)
    adapters.add_adapter(published)
    adapters.activate_adapter(published.id)
