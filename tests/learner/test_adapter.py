"""A LoRA adapter's folder becomes a model folder that computes what PEFT computes; one that does not fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmdflow.data.inputs import resolve_inputs
from pmdflow.data.tokenizer import end_ids
from pmdflow.learner.adapter import merge_adapter
from pmdflow.learner.loading import check_loading
from tests.support.adapter import save_adapter
from tests.support.data import CHAT_TEMPLATE, make_config, save_tokenizer
from tests.support.paths import TINY

IDS = torch.tensor([[5, 9, 12, 40]])


def merge(adapter: Path, out: Path) -> Path:
    """The folder `out`, merged as a run merges."""
    merge_adapter(resolve_inputs(make_config(str(adapter), "reasoning_gym/gcd"), merged=out))
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 9]},
    ],
)
def test_a_merged_folder_computes_what_peft_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = save_adapter(tmp_path / "adapter", **settings)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY), str(adapter)))
    merge(adapter, tmp_path / "model")
    check_loading(tmp_path / "model")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert (
        (found - expected).abs().max() < 1e-3 < (found - logits(AutoModelForCausalLM.from_pretrained(TINY))).abs().max()
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == AutoTokenizer.from_pretrained(TINY).get_vocab()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_the_base_model_is_found_as_the_adapter_names_it(tmp_path: Path) -> None:
    adapter, merged = save_adapter(tmp_path / "adapter"), tmp_path / "run" / "model"
    inputs = resolve_inputs(make_config(str(adapter), "reasoning_gym/gcd"), merged=merged)
    assert (inputs.adapter, inputs.base, inputs.config.model.path) == (adapter, TINY, str(merged))
    assert set(inputs.model) == {"adapter", "base"}
    save_adapter(adapter, base="no/such-folder-here")
    with pytest.raises(ValueError, match=r"model\.path is 'no/such-folder-here'"):
        resolve_inputs(make_config(str(adapter), "reasoning_gym/gcd"), merged=merged)


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "model"
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name.replace("layers.3", "layers.7"): tensor for name, tensor in weights.items()}, path)
    with pytest.raises(ValueError, match=rf"model\.path is '{adapter}': \d+ of its weights do not fit {TINY}"):
        merge(adapter, out)
    save_file(
        {name: tensor[..., :2].contiguous() if "lora_A" in name else tensor for name, tensor in weights.items()}, path
    )
    with pytest.raises(ValueError, match=f"it cannot be merged with {TINY}"):
        merge(adapter, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "model.embed_tokens, lm_head"),
    ],
)
def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path: Path, layers: dict[str, Any], named: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", **layers)
    with pytest.raises(
        ValueError, match=rf"cannot be merged with {TINY}: it adapts {named}, whose weights .* both; adapt"
    ):
        merge(adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_stands_beside_the_bases_weights_goes_on_byte_for_byte(tmp_path: Path) -> None:
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    beside = {"generation_config.json": '{"temperature": 0.6, "eos_token_id": [1, 7]}', "LICENSE.txt": "base's"}
    for name, text in beside.items():
        (base / name).write_text(text)
    adapter = save_adapter(tmp_path / "adapter", base)
    (adapter / "LICENSE.txt").write_text("adapter's")
    merged = merge(adapter, tmp_path / "model")
    for name in [*beside, "tokenizer.json", "tokenizer_config.json"]:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    (base / "generation_config.json").unlink()
    assert not (merge(adapter, tmp_path / "other") / "generation_config.json").exists()
    assert end_ids(str(tmp_path / "other")) == end_ids(str(base))


def test_an_adapters_own_tokenizer_is_the_merged_models(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    save_tokenizer(adapter, chat_template=CHAT_TEMPLATE)
    merged = merge(adapter, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (adapter / name).read_bytes(), name
