"""A model folder loaded for training, and whether its weights are those of its architecture, asked without memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from pmdflow.learner.attention import ATTENTION, require_packable
from pmdflow.learner.layers import family_problems, has_soft_cap
from pmdflow.learner.slices import Part, load_part

NAMES_SHOWN = 4


def load_model(path: str, *, packing: bool, part: Part | None = None) -> Any:
    """The causal language model of a folder, in float32, with the attention that its sequences need.

    Args:
        path: The folder.
        packing: Whether sequences share a row.
        part: Whose rows of the weights are wanted; the others of a model that is to be sharded need not be there.

    Raises:
        ValueError: the folder holds no causal language model, or sequences of it cannot share a row.
    """
    try:
        attention: Any = {"attn_implementation": ATTENTION if packing else None}
        if part is None or part.ranks == 1:
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **attention)
        else:
            model = load_part(Path(path), part, **attention)
    except OSError as error:
        raise ValueError(f"model.path {path} is no Hugging Face model folder with weights: {error}") from error
    if packing:
        require_packable(model, path)
    elif has_soft_cap(model.config):
        model.set_attn_implementation("eager")  # what transformers takes by itself leaves the cap out
    return model


def check_family(folder: Path, *, packing: bool, slots: bool) -> None:
    """Refuse a model that the settings do not fit by its family, from config.json alone.

    Args:
        folder: The folder; it may lack the weights.
        packing: Sequences share a row of the learner.
        slots: The transformers engine generates.

    Raises:
        ValueError: names the family, what it does, and the setting that takes it.
    """
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            families = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
        except Exception as error:  # reading a configuration and importing its class can fail in any way
            raise ValueError(f"model.path is {str(folder)!r}: {_refusal(error)}") from error
    listed = families if isinstance(families, tuple) else (families,)
    try:
        found = [problem for family in listed for problem in family_problems(config, family)]
    except ValueError as error:  # of several models in one, none of which is the one that speaks
        raise ValueError(
            f"model.path is {str(folder)!r}: a {config.model_type} is no causal language model ({error}); "
            "choose another model"
        ) from error
    problems = ", ".join(dict.fromkeys(found))
    has = f"model.path is {str(folder)!r}: a {config.model_type} has {problems}"
    refusals = [
        *([f"{has}: sequences cannot share a row; set learner.packing to false"] if packing else []),
        *([f"{has}: the transformers engine cannot cache it; set rollout.engine to vllm"] if slots else []),
    ]
    if problems and refusals:
        raise ValueError("\n".join(refusals))


def check_loading(folder: Path) -> None:
    """Refuse weights of which a key is missing, left over or of another shape: loading would make up the missing ones.

    The folder is loaded onto the meta device, so what the loader renames, ties, fuses or splits is as it will be.

    Raises:
        ValueError: names the keys, or says why there is no such model.
    """
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            problems = list(_class_problems(config))
            problems = problems or list(_loading_problems(folder))
        except Exception as error:  # reading a configuration and building its class can fail in any way
            problems = [_refusal(error)]
    if problems:
        raise ValueError("\n".join(f"model.path is {str(folder)!r}: {problem}" for problem in problems))


def _loading_problems(folder: Path) -> Iterator[str]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="meta",
        dtype="auto",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    model, info = loaded
    causal = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    if causal == {False} and not getattr(model.config, "is_decoder", True):
        yield (
            f"the attention of a {model.config.model_type} with these settings sees later tokens too: it does not "
            "predict the next token; choose a causal language model"
        )
    yield from _key_problems(info)


def _class_problems(config: Any) -> Iterator[str]:
    made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if made is None:
        yield f"a {config.model_type} is no causal language model of the installed transformers; choose another model"
        return
    known = {made} if isinstance(made, str) else set(made)
    named = set(config.architectures or known)
    if not named & known:
        yield (
            f"its architecture is {', '.join(sorted(named))}, not {' or '.join(sorted(known))}: it does not predict "
            "the next token; choose a causal language model"
        )


def _key_problems(info: dict[str, Any]) -> Iterator[str]:
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    prefix = _prefix(missing, unexpected)
    if prefix:
        yield f"the names of its weights begin with {prefix!r}, which the model's do not; rename them"
        return
    if missing:
        yield f"its weights lack {_names(missing)}, which would be made up; fetch the whole model"
    if unexpected:
        yield f"its weights hold {_names(unexpected)}, which the model has no place for; give its own config.json"
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        shapes = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in mismatched]
        yield f"its weights have other shapes than the model: {_names(shapes)}; give its own config.json"
    yield from info.get("error_msgs") or ()


def _prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What every key that is left over has before a missing one's name; empty if that is not what is wrong."""
    if not missing or not unexpected:
        return ""
    ends = [name for name in missing if unexpected[0].endswith(f".{name}")]
    prefix = unexpected[0].removesuffix(max(ends, key=len)) if ends else ""
    return prefix if prefix and all(name.startswith(prefix) for name in unexpected) else ""


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def _refusal(error: Exception) -> str:
    message = " ".join(line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()[:2])
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run; choose a model that transformers knows by itself"
    return f"transformers cannot load it: {message}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loader's own report and progress bar."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
