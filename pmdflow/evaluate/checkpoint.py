"""What `pmdflow eval` takes as a checkpoint: a run, one of its checkpoints, or a model folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pmdflow.config.load import load_run
from pmdflow.config.schema import Config, ModelConfig
from pmdflow.errors import LaunchError
from pmdflow.learner.checkpoint.manifest import manifest_at, newest_manifest
from pmdflow.rollout.engine import RolloutEngine

_CHECKPOINT = re.compile(r"iteration-(\d{6,})(\.json)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights to evaluate."""

    model: str
    """Folder in Hugging Face format, for the architecture and the tokenizer."""
    directory: Path | None
    """Files of a run's checkpoint, whose weights replace the folder's; None for the folder's own."""
    version: int
    name: str
    run: Config | None
    """The configuration of its run."""


def find_checkpoint(path: Path) -> Checkpoint:
    """A run directory's newest checkpoint, one of its checkpoints, or a Hugging Face folder.

    Raises:
        LaunchError: it is none of these, or the run has no checkpoint yet.
    """
    path = path.absolute()
    match = _CHECKPOINT.fullmatch(path.name)
    run = path.parent.parent if match else path
    if is_run(run):
        config = load_run(run).config
        root = run / "checkpoints"
        manifest = manifest_at(root, int(match[1])) if match else newest_manifest(root)
        if manifest is None:
            raise LaunchError(
                f"{run} has no whole checkpoint yet", hint=f"wait for one, or evaluate {config.model.path}"
            )
        name = f"{run.name}-iteration-{manifest.iteration}"
        return Checkpoint(
            model=config.model.path, directory=manifest.directory, version=manifest.version, name=name, run=config
        )
    if (path / "config.json").is_file():
        return Checkpoint(model=str(path), directory=None, version=0, name=path.name, run=None)
    what = "holds neither a run (config.yaml) nor a model (config.json)" if path.is_dir() else "is no directory"
    raise LaunchError(
        f"{path} {what}", hint="give a run directory, RUN/checkpoints/iteration-NNNNNN or a Hugging Face folder"
    )


def stored_dtype(model: str) -> str:
    """The type that a folder's weights say they are in, if models are computed in it here; else float32."""
    values: Mapping[str, Any] = json.loads((Path(model) / "config.json").read_text())
    stored = values.get("dtype") or values.get("torch_dtype")
    return str(stored) if stored in get_args(ModelConfig.model_fields["dtype"].annotation) else "float32"


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory."""
    return (path / "config.yaml").is_file() and (path / "run.lock").is_file()


def make_engine_of(checkpoint: Checkpoint, config: Config, *, seed: int) -> RolloutEngine:
    """The engine that `config` asks for, with the checkpoint's weights."""
    from pmdflow.rollout.engines.make import make_engine

    engine = make_engine(config, seed=seed)
    if checkpoint.directory is not None and checkpoint.run is not None:
        from pmdflow.learner.checkpoint.weights import checkpoint_weights

        weights = checkpoint_weights(
            checkpoint.directory, lora=checkpoint.run.learner.lora, tied=_is_tied(checkpoint.model)
        )
        staged = engine.stage(weights)
        engine.pause()
        engine.load_weights(checkpoint.version, staged, on_new_weights="reprefill")
        engine.resume()
    return engine


def _is_tied(model: str) -> bool:
    """By the family's own default where the folder does not say it."""
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(model).get_text_config().tie_word_embeddings)
