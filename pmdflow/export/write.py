"""A checkpoint of a run, live or finished, as a folder that transformers, vLLM and PEFT load."""

from __future__ import annotations

from pathlib import Path

import torch

from pmdflow.config.load import load_run
from pmdflow.config.recorded import recorded_meta
from pmdflow.config.schema import Config
from pmdflow.data.fingerprint import changed_files
from pmdflow.data.folder_files import LEGAL_FILES, TOKENIZER_FILES, copy_files
from pmdflow.errors import PmdflowError
from pmdflow.export.adapter import write_adapter
from pmdflow.export.card import hub_model, model_card
from pmdflow.export.files import write_config, write_generation_config
from pmdflow.export.folder import new_folder, write_shards
from pmdflow.export.held import HeldCheckpoint
from pmdflow.export.layout import Layout
from pmdflow.export.options import Dtype, ExportOptions
from pmdflow.export.weights import BaseWeights, merged_tensors, whole_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(run: Path, out: Path, options: ExportOptions) -> str:
    """Write a checkpoint of `run` to the new folder `out`, tensor by tensor; a crash leaves no folder of that name.

    Args:
        run: Run directory; it may be live, finished or crashed.
        out: Folder to make; an empty one is taken.
        options: What of it.

    Returns:
        What was exported, in words.

    Raises:
        PmdflowError: no such run or checkpoint, a folder that is not empty, weights that do not fit the model, or a
            model folder that has changed since the run was begun.
    """
    config = run_config(run, base_weights=not options.adapter)
    _require_adapters(run, config, options)
    with HeldCheckpoint.of(run, options.iteration) as checkpoint, new_folder(out) as folder:
        manifest = checkpoint.manifest
        if options.adapter and config.learner.lora is not None:
            dtype = options.dtype or "float32"
            base, commit = hub_model(run) or (config.model.path, None)
            write_adapter(folder, checkpoint, config.learner.lora, base=base, commit=commit, dtype=DTYPES[dtype])
        else:
            dtype = options.dtype or config.model.compute
            _write_model(folder, checkpoint, config, dtype, options.shard_bytes)
        copy_files(Path(config.model.path), folder, (*TOKENIZER_FILES, *LEGAL_FILES))
        card = model_card(
            run, iteration=manifest.iteration, version=manifest.version, dtype=dtype, adapter=options.adapter
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    what = "adapters" if options.adapter else "weights"
    return f"{what} of iteration {manifest.iteration} (version {manifest.version}) in {dtype}"


def _write_model(folder: Path, checkpoint: HeldCheckpoint, config: Config, dtype: Dtype, shard_bytes: int) -> None:
    model, lora = Path(config.model.path), config.learner.lora
    layout = Layout(model, dtype=DTYPES[dtype])
    if lora is None:
        tensors = whole_tensors(layout, checkpoint)
    else:
        tensors = merged_tensors(layout, checkpoint, BaseWeights(model), lora)
    write_shards(folder, tensors, layout.stored, shard_bytes=shard_bytes)
    write_config(model, folder, dtype=dtype)
    write_generation_config(model, folder)


def _require_adapters(run: Path, config: Config, options: ExportOptions) -> None:
    if options.adapter and config.learner.lora is None:
        raise PmdflowError(f"{run} trains all weights (learner.lora is null)", hint="leave out --adapter")
    if options.adapter and options.push is not None and hub_model(run) is None:
        raise PmdflowError(
            f"--push of adapters: they adapt {config.model.path}, a folder that only this machine has",
            hint="push --merged",
        )


def run_config(run: Path, *, base_weights: bool = True) -> Config:
    """The configuration of a run, whose model folder is on this machine and as it was.

    Args:
        run: The run directory.
        base_weights: If the run trains adapters, these are added to the folder's weights.

    Raises:
        PmdflowError: it is no run directory, or the model folder is missing or has changed.
    """
    if not (run / "config.yaml").is_file():
        raise PmdflowError(f"{run} is no run directory (it has no config.yaml)")
    config = load_run(run).config
    if not (Path(config.model.path) / "config.json").is_file():
        raise PmdflowError(
            f"{run} was made from the model folder {config.model.path}, which is not here: configuration and "
            "tokenizer come from it",
            hint="run this where `pmdflow up` was run, or put it there",
        )
    _require_unchanged(run, Path(config.model.path), weights=base_weights and config.learner.lora is not None)
    return config


def _require_unchanged(run: Path, folder: Path, *, weights: bool) -> None:
    """Only of a local folder is it known what it held: a commit of the Hub and what an adapter was merged to stay."""
    recorded = ((recorded_meta(run).get("inputs") or {}).get("model") or {}).get("files")
    try:
        changed = changed_files(folder, recorded, weights=weights) if recorded else []
    except ValueError as error:
        raise PmdflowError(f"{run} was begun with {folder}: {error}") from error
    if changed:
        raise PmdflowError(
            f"{run} was begun with {folder}, whose {', '.join(changed)} changed since",
            hint="put back what was there"
            + ("; or export with --adapter, which needs no weights of it" if weights else ""),
        )
