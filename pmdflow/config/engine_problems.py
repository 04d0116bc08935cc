"""What of vLLM's own arguments the loop decides, and what makes its tokens other than the learner's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmdflow.config.schema import Config, LearnerConfig
    from pmdflow.config.sequences import RolloutConfig

_KEPT = "leave it out"
OWNED_ARGUMENTS = {
    "model": "set model.path",
    "dtype": "set model.dtype",
    "seed": "set run.seed",
    "max_model_len": "set data.max_tokens and data.max_prompt_tokens",
    "max_num_seqs": "set rollout.slots",
    "tensor_parallel_size": "set rollout.tensor_parallel",
    **dict.fromkeys(("pipeline_parallel_size", "data_parallel_size"), "set rollout.tensor_parallel or rollout.actors"),
    **dict.fromkeys(("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype"), "set learner.lora"),
    "gpu_memory_utilization": "set rollout.memory_share",
    "kv_cache_memory_bytes": "set rollout.memory_share",
    "enable_sleep_mode": "set cluster.colocate",
    "speculative_config": "set rollout.speculation",
    "per_request_spec_decode_metrics": "set rollout.speculation",
    **dict.fromkeys(
        (
            "disable_log_stats", "distributed_executor_backend", "enable_prefix_caching", "generation_config",
            "hf_overrides", "load_format", "logits_processors", "logprobs_mode", "override_generation_config",
            "scheduling_policy", "skip_tokenizer_init", "tokenizer", "weight_transfer_config", "worker_extension_cls",
        ),
        _KEPT,
    ),
}  # fmt: skip
"""Arguments of vLLM that `rollout.engine_args` may not have, and what to do instead."""


def engine_problems(config: Config) -> Iterator[str]:
    """One line `key ...: why; remedy` for each, as `combination_problems`."""
    given = config.rollout.engine_args
    for name in sorted(name for name in given if not name.isidentifier()):
        word = name.strip("-").replace("-", "_")
        yield f"rollout.engine_args names {name}, which is no argument of vLLM; write {word}"
    for name in sorted(given.keys() & OWNED_ARGUMENTS.keys()):
        yield f"rollout.engine_args names {name}, which the loop sets itself; {OWNED_ARGUMENTS[name]}"
    for name in lossy_arguments(config.rollout):
        if correction(config.learner) is None:
            yield (
                f"rollout.engine_args.{name} is {given[name]} while learner.importance_weights is none: the engine's "
                "tokens are of another distribution than the learner's; set importance_weights to token"
            )


def lossy_arguments(rollout: RolloutConfig) -> list[str]:
    """Those of `rollout.engine_args` that make the engine sample from another distribution than its weights'."""
    given = rollout.engine_args
    names = ["quantization"] if given.get("quantization") is not None else []
    exact = ("auto", "bfloat16", "float16", "float32")
    return names + (["kv_cache_dtype"] if given.get("kv_cache_dtype", "auto") not in exact else [])


def correction(learner: LearnerConfig) -> str | None:
    """What makes up for tokens of another distribution than the learner's, in words; None: nothing."""
    if learner.algorithm == "ctpo":
        return "the ratio of ctpo, which runs from the generating engine"
    if learner.importance_weights == "none":
        return None
    veto = ", and a veto" if learner.veto else ""
    return f"importance weights ({learner.importance_weights}, at most {learner.importance_cap:g}){veto}"
