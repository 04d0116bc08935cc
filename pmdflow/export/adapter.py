"""Low-rank adapters as a PEFT folder."""

from __future__ import annotations

from pathlib import Path

import torch

from pmdflow.config.schema import LoraConfig
from pmdflow.errors import PmdflowError
from pmdflow.export.folder import save_tensors
from pmdflow.export.held import HeldCheckpoint
from pmdflow.export.weights import adapter_tensors, published_adapters
from pmdflow.weights.lora import UP


def write_adapter(
    folder: Path, checkpoint: HeldCheckpoint, lora: LoraConfig, *, base: str, commit: str | None, dtype: torch.dtype
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        folder: Where to.
        checkpoint: Of a run that trains adapters.
        lora: Their settings.
        base: Folder or Hub id of the model that they adapt; a folder is noted as an absolute path.
        commit: Of the Hub's model; None for a folder.
        dtype: Type of the adapters.

    Raises:
        PmdflowError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise PmdflowError("--adapter needs peft", hint="run `uv sync --extra lora`") from error
    save_tensors(adapter_tensors(checkpoint, dtype), folder / "adapter_model.safetensors")
    layers = [name.removesuffix(UP) for name in published_adapters(checkpoint) if name.endswith(UP)]
    peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=sorted({layer.rpartition(".")[2] for layer in layers})
        if lora.targets == "all-linear"
        else lora.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).absolute()) if commit is None else base,
        revision=commit,
        inference_mode=True,
    ).save_pretrained(str(folder))
