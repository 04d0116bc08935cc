"""Weights that are not those of the architecture are refused by name, and those that are load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pmdflow.learner.loading import check_family, check_loading

Weights = dict[str, Tensor]
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "moe_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def save_model(folder: Path, kind: str = "qwen3", *, shard: str = "1GB", **settings: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SMALL, **settings}))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def change(folder: Path, weights: Callable[[Weights], Weights], **config: Any) -> None:
    path = folder / "model.safetensors"
    save_file(weights(load_file(path)), path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe", "gemma3_text"])
def test_sharded_tied_and_expert_weights_are_whole(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = save_model(tmp_path, kind, shard="20KB", tie_word_embeddings=tied)
    assert len(list(folder.glob("*.safetensors"))) > 2
    check_loading(folder)


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if "1.mlp" not in n}, {}, r"lack model\.layers\.1\.mlp\.down_proj"),
        (lambda w: {n: t for n, t in w.items() if "norm" not in n}, {}, r"lack model\..* and 1 more, which would be"),
        (lambda w: {f"module.{n}": t for n, t in w.items()}, {}, r"begin with 'module\.', which the model's do not"),
        (lambda w: {**w, "value_head.weight": torch.ones(3)}, {}, r"hold value_head\.weight, which .* no place"),
        (lambda w: w, {"intermediate_size": 40}, r"other shapes .*down_proj\.weight \(32, 48\) for \(32, 40\)"),
        (lambda w: w, {"num_hidden_layers": 1}, r"hold model\.layers\.1\."),
        (lambda w: w, {"num_hidden_layers": 3}, r"lack model\.layers\.2\."),
        (lambda w: w, {"model_type": "nothing"}, "transformers cannot load it: .*`nothing`"),
        (lambda w: w, {"model_type": "t5"}, "a t5 is no causal language model"),
        (lambda w: w, {"architectures": ["LlamaForTokenClassification"]}, "not LlamaForCausalLM: it does not predict"),
        (
            lambda w: w,
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            "code of its own, which is never",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    tmp_path: Path, weights: Callable[[Weights], Weights], config: dict[str, Any], message: str
) -> None:
    folder = save_model(tmp_path, "llama")
    check_loading(folder)
    change(folder, weights, **config)
    with pytest.raises(ValueError, match=rf"(?s)model\.path is '{folder}': .*{message}"):
        check_loading(folder)


def test_pickled_weights_are_judged_too(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    check_loading(folder)
    torch.save({name: tensor for name, tensor in weights.items() if "0.mlp" not in name}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\.mlp"):
        check_loading(folder)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("rwkv", "a recurrent state"),
        ("mamba", "a recurrent state"),
        ("nemotron_h", "a recurrent state"),
        ("recurrent_gemma", "a recurrent state"),
        ("qwen3_next", "a recurrent state"),
        ("llama4_text", "layers of chunked_attention"),
        ("falcon", "attention that cannot be replaced"),
        ("bloom", "attention that cannot be replaced"),
    ],
)
def test_families_are_refused_by_name_from_their_configuration(tmp_path: Path, kind: str, problem: str) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"a {kind} has {problem}.* cannot share a row; set learner.packing to false$"):
        check_family(tmp_path, packing=True, slots=False)
    with pytest.raises(ValueError, match=f"a {kind} has {problem}.* cannot cache it; set rollout.engine to vllm$"):
        check_family(tmp_path, packing=False, slots=True)
    check_family(tmp_path, packing=False, slots=False)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "mistral"])
def test_families_with_windows_are_taken(tmp_path: Path, kind: str) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    check_family(tmp_path, packing=True, slots=True)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused_by_name_and_as_a_decoder_taken(tmp_path: Path, kind: str) -> None:
    check_loading(save_model(tmp_path / "decoder", kind, is_decoder=True))
    with pytest.raises(ValueError, match=f"the attention of a {kind} with these settings sees later tokens too"):
        check_loading(save_model(tmp_path / "encoder", kind))
