"""A LoRA adapter's folder as a model: merged with its base once, in a folder like any other."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig

from pmdflow import durable
from pmdflow.data.folder_files import LEGAL_FILES, TOKENIZER_FILES, copy_files
from pmdflow.data.inputs import MERGED_FROM, Inputs

GENERATION_CONFIG = "generation_config.json"


def merge_adapter(inputs: Inputs) -> None:
    """Write the folder at `config.model.path`: the base model with the adapter's update; it is there when it is whole.

    The update is added in the base's own type, as every program that merges does: the merged model is the policy that
    training begins with, in engine and learner alike. A folder of the same name is replaced.

    Raises:
        ValueError: PEFT is not installed or cannot read the adapter, the base has no place for some of it, or merging
            would change what is not adapted.
    """
    adapter, base, out = inputs.adapter, inputs.base, Path(inputs.config.model.path)
    assert adapter is not None, "there is nothing to merge"
    merged = _merged(adapter, base)
    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    merged.generation_config = GenerationConfig()  # not every base's can be saved again: its file is copied
    merged.save_pretrained(aside)
    (aside / GENERATION_CONFIG).unlink(missing_ok=True)
    copy_files(adapter, aside, LEGAL_FILES)
    copy_files(base, aside, (*LEGAL_FILES, GENERATION_CONFIG))
    copy_files(inputs.tokenizer, aside, TOKENIZER_FILES)
    (aside / MERGED_FROM).write_text(json.dumps(inputs.model, indent=2) + "\n", encoding="utf-8")
    durable.sync_tree(aside)
    shutil.rmtree(out, ignore_errors=True)
    durable.rename(aside, out)


def _merged(adapter: Path, base: Path) -> Any:
    """The base model with the adapter's update, in memory; see `merge_adapter`."""
    if find_spec("peft") is None:
        raise ValueError(f"model.path is {str(adapter)!r}, an adapter, which needs PEFT: run `uv sync --extra lora`")
    from peft import PeftConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    try:
        adapted: Any = get_peft_model(model, PeftConfig.from_pretrained(str(adapter)))
        _require_untied(adapted)
        loaded = adapted.load_adapter(str(adapter), "default")
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT raises whatever its parts do
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model.path is {str(adapter)!r}: it cannot be merged with {base}: {message}") from error
    if wrong := sorted({*loaded.missing_keys, *loaded.unexpected_keys}):
        raise ValueError(
            f"model.path is {str(adapter)!r}: {len(wrong)} of its weights do not fit {base}, such as {wrong[0]}; give "
            "the adapter its own base model (base_model_name_or_path of adapter_config.json)"
        )
    return merged


def _require_untied(adapted: Any) -> None:
    """Refuse adapted layers whose weights another layer has too; single tokens are adapted in all of these alike.

    Answers before and after would not tell: in bfloat16, merging a right adapter changes them more.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(parameter) for _, parameter in adapted.named_parameters(remove_duplicate=False))
    tied = [
        name.removeprefix("base_model.model.")
        for name, layer in adapted.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and not isinstance(layer, TrainableTokensLayer)
        and any(uses[id(parameter)] > 1 for parameter in layer.get_base_layer().parameters())
    ]
    if tied:
        raise ValueError(
            f"it adapts {', '.join(tied)}, whose weights another layer has too (tie_word_embeddings): merging would "
            "change both; adapt other layers, or a base whose embeddings are not tied"
        )
