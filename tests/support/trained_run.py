"""A run directory that a real learner trained on made claims: checkpoints, archive and metrics, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import yaml

from pmdflow.config.schema import Config
from pmdflow.learner.checkpoint.manifest import Manifest, commit_checkpoint, prune
from pmdflow.learner.learner import Learner
from pmdflow.metrics.claim import claim_metrics
from pmdflow.metrics.recorder import Recorder
from pmdflow.run.directory import RunDirectory
from pmdflow.store.archive import write_part
from pmdflow.types import Claim
from tests.support.checkpoint_files import written
from tests.support.fixture_run import make_batch
from tests.support.paths import TINY
from tests.support.runs import small_config

MIB = 1 << 20


class TrainedRun:
    """Trains an iteration at a time and checkpoints each.

    Example:
        with TrainedRun(tmp_path, learner__lora={"rank": 4}) as run:
            run.train(2)
    """

    def __init__(self, directory: Path, **overrides: Any) -> None:
        """Begin a run; `overrides` are those of `small_config`."""
        self.config = Config.model_validate(small_config(directory, learner__lr=1e-2, **overrides))
        self._owner = RunDirectory.prepare(self.config)
        self.path = self._owner.path
        (self.path / "store").mkdir(exist_ok=True)
        self._recorder = Recorder(self.path)
        self._recorder.event("start", "pmdflow up")
        self._evaluate(0)
        torch.set_num_threads(1)
        self.learner = Learner(config=self.config, rank=0)
        self.learner.setup(self.learner.address())
        self._owner.write_meta(self.config, self.learner.device_info())
        self.done = 0

    def train(self, iterations: int = 1, *, keep: int = 100) -> None:
        """Train, checkpoint, archive and record."""
        for _ in range(iterations):
            self.done += 1
            batch = make_batch(self.done)
            result = self.learner.train(batch)
            manifest = Manifest.new(self.path / "checkpoints", iteration=self.done, version=self.done, lsn=0)
            self.learner.save(str(manifest.writing))
            commit_checkpoint(manifest.root, manifest, self.learner.await_saved())
            prune(manifest.root, keep)
            write_part(self.path, batch, attrs=self._owner.archive_attrs(self.config))
            identity = {"iteration": self.done, "version": self.done, "learner/lr": np.float64(1e-2)}
            self._recorder.metric("iteration", {**identity, **claim_metrics(Claim.of(batch)), **result.metrics})
            self._evaluate(self.done)

    def _evaluate(self, iteration: int) -> None:
        values = {"eval/round": iteration, "eval/reward_mean": 0.25 + 0.125 * iteration, "eval/prompts": 8}
        self._recorder.metric("eval", values)

    def __enter__(self) -> Self:
        """It has begun."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the process group and let go of the directory."""
        self.learner.close()
        self._recorder.close()
        self._owner.__exit__(None, None, None)


def random_model(folder: Path, config: Any, *, tokenizer: Path) -> Path:
    """A model folder with random weights and another folder's tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def synthetic_run(directory: Path, *, num_layers: int, hidden_size: int) -> Path:
    """A run directory with a checkpoint of a Qwen3 of any size; its model folder has no weights."""
    from torch.distributed.checkpoint.state_dict_saver import save
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=num_layers, num_attention_heads=8,
        num_key_value_heads=8, head_dim=hidden_size // 8, vocab_size=316, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    folder = directory / "model"
    config.save_pretrained(folder)
    for path in TINY.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    run = directory / "runs" / "synthetic"
    manifest = Manifest.new(run / "checkpoints", iteration=1, version=1, lsn=0)
    manifest.writing.mkdir(parents=True)
    state = {"model": {f"model.{name}": torch.randn(shape) for name, shape in shapes.items()}}
    save(state, checkpoint_id=manifest.writing, no_dist=True)
    commit_checkpoint(manifest.root, manifest, written(manifest.writing))
    settings = Config.model_validate(small_config(directory, run__name="synthetic", model__path=str(folder)))
    (run / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    (run / "meta.json").write_text(json.dumps({"pmdflow": "0.1.0"}))
    return run
