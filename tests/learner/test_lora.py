"""Adapters: trained, saved, published and used by the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from pmdflow.errors import PmdflowError
from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.weights.lora import merged
from tests.support.learner import LOGPROB_SIZE, ROUNDINGS, make_batch, make_config
from tests.support.numeric import assert_close

torch.set_num_threads(1)


def test_adapters_alone_are_trained_saved_and_published(start, model_path, tmp_path):
    pytest.importorskip("peft")
    lora = {"rank": 4, "alpha": 8}
    learner = start(make_config(model_path, lora=lora, lr=1e-2))
    plain = start(make_config(model_path)).train(make_batch()).metrics["learner/step_losses"]
    learner = start(make_config(model_path, lora=lora, lr=1e-2))
    results = [learner.train(make_batch(seed=seed)) for seed in (0, 1)]
    # B begins at 0, and the loss of a first step depends on rewards alone: a mean over 18 sequences.
    assert_close(results[0].metrics["learner/step_losses"][0], plain[0], roundings=18, size=1.0)
    learner.save(str(tmp_path / "saved"))
    weights = learner.weights()
    expected = learner.train(make_batch(seed=2)).metrics
    learner.await_saved()
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    assert len(weights) == 2 * 7 * 2, "A and B of seven linear layers in two decoder layers"

    saved = FileSystemReader(tmp_path / "saved").read_metadata().state_dict_metadata
    assert all("lora_" in name for name in saved if name.startswith(("model.", "optimizer.state.")))
    learner = start(make_config(model_path, lora=lora, lr=1e-2))
    learner.load(str(tmp_path / "saved"))
    assert learner.train(make_batch(seed=2)).metrics == expected


def test_the_engine_generates_with_published_adapters(start, model_path, tmp_path):
    pytest.importorskip("peft")
    learner = start(make_config(model_path, lora={"rank": 4}, lr=3e-2))
    for seed in (0, 1):
        learner.train(make_batch(seed=seed))
    published = learner.weights()
    engine = TransformersEngine(model_path=model_path, dtype="float32", num_slots=2, threads=1, seed=0)
    for version in (1, 2):  # twice: the second must not add to the first
        engine.load_weights(version, published, on_new_weights="keep_kv")
    engine.add(Request(id=0, tokens=np.array([5, 6], np.int32), limit=8, remaining=8, temperature=0.8))
    outputs = [output for _ in range(8) for output in engine.step()]
    batch = make_batch(groups=1)
    tokens = [5, 6, *(output.tokens[0] for output in outputs)]
    generated = np.array([0, 0] + [3] * len(outputs), np.uint8)
    batch = replace(
        batch,
        tokens=np.array(tokens * 3, np.int32),
        logprobs=np.tile(np.array([0, 0, *(output.logprobs[0] for output in outputs)], np.float32), 3),
        versions=np.tile(np.where(generated, batch.version, -1).astype(np.int32), 3),
        temperatures=np.tile(np.where(generated, 0.8, 1).astype(np.float32), 3),
        mask=np.tile(generated, 3),
        cu_seqlens=np.arange(4) * len(tokens),
        prompt_lengths=np.full(3, 2, np.int32),
    )
    result = learner.train(batch)
    assert_close(result.metrics["learner/mismatch_kl"], 0.0, roundings=ROUNDINGS, size=LOGPROB_SIZE)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in published.items() if "lora_B" in name)


def test_merging_names_an_unknown_layer():
    adapters = {"nothing.lora_A.weight": torch.ones(1, 2), "nothing.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(PmdflowError, match="adapters of nothing, which the model does not have"):
        merged(adapters, {"q.weight": torch.zeros(2, 2)})
