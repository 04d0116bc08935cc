"""The models that the recipes name: their shapes as config.json states them, and what was measured of these."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen3Config

from pmdflow.config.memory import Footprint


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )  # fmt: skip


def _qwen2(hidden: int, inner: int, layers: int, heads: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768,
    )  # fmt: skip


SHAPES: dict[str, Any] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(896, 4864, 24, 14),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2(1536, 8960, 28, 12),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": _qwen2(1536, 8960, 28, 12),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
}


def _footprint(whole: int, layer: int, root: int, layers: int, hidden: int, cache: int, activations: int) -> Footprint:
    return Footprint(
        num_parameters=whole, layer_parameters=layer, root_parameters=root, head_parameters=151936 * hidden,
        num_layers=layers, hidden_size=hidden, vocab_size=151936, kv_numbers_per_token=cache,
        activation_bytes=activations,
    )  # fmt: skip


FOOTPRINTS = {
    "Qwen/Qwen2.5-0.5B-Instruct": _footprint(494032768, 14912384, 136135552, 24, 896, 6144, 1383436),
    "Qwen/Qwen2.5-1.5B-Instruct": _footprint(1543714304, 46797824, 233375232, 28, 1536, 14336, 2907180),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": _footprint(1543714304, 46797824, 233375232, 28, 1536, 14336, 2907180),
    "Qwen/Qwen3-0.6B": _footprint(596049920, 15730944, 155583488, 28, 1024, 57344, 2018412),
    "Qwen/Qwen3-4B": _footprint(4022468096, 100930816, 388958720, 36, 2560, 73728, 6145964),
    "Qwen/Qwen3-8B": _footprint(8190735360, 192946432, 1244663808, 36, 4096, 73728, 7777196),
    "Qwen/Qwen3-32B": _footprint(32762123264, 487598336, 1555829760, 64, 5120, 131072, 24314892),
}
"""What `measure_footprint` says of `SHAPES` in bfloat16."""
