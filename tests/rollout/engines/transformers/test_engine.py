"""The transformers engine against the plain model: same tokens, same log-probs, whatever the company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import MambaConfig, MambaForCausalLM

from tests.support.engine import (
    EOS,
    LOGPROB_ATOL,
    Record,
    full_logprobs,
    greedy_reference,
    make_engine,
    prompt,
    request,
)


def test_logprobs_equal_full_forward_when_sequences_join_and_leave(model_path: str, model: Any) -> None:
    engine = make_engine(model_path, num_slots=5)
    rng = np.random.default_rng(3)
    prompts = {i: prompt(int(rng.integers(1, (12, 60, 250)[i % 3])), seed=i) for i in range(24)}
    temperatures = {i: (1.0, 0.7, 1.3, 0.0)[i % 4] for i in prompts}
    waiting, record = list(prompts), Record()
    while waiting or engine.active():
        free = engine.num_slots - engine.active()
        for i in [waiting.pop(0) for _ in range(min(free, int(rng.integers(0, 3)), len(waiting)))]:
            engine.add(request(i, prompts[i], temperature=temperatures[i], remaining=int(rng.integers(1, 70))))
        record.take(engine.step())
    assert record.stops.keys() == prompts.keys()
    for i, tokens in record.tokens.items():
        expected = full_logprobs(model, prompts[i], tokens, temperature=temperatures[i])
        np.testing.assert_allclose(record.logprobs[i], expected, atol=LOGPROB_ATOL)


def test_greedy_equals_generate_for_mixed_lengths(model_path: str, model: Any) -> None:
    engine = make_engine(model_path)
    prompts = [prompt(length, seed=100 + length) for length in (1, 2, 7, 33, 80, 5, 120, 18)]
    for i, tokens in enumerate(prompts):
        engine.add(request(i, tokens, temperature=0.0, remaining=10 + 7 * i))
    record = Record().run(engine)
    for i, tokens in enumerate(prompts):
        assert record.tokens[i] == greedy_reference(model, tokens, tokens=10 + 7 * i)


def test_interruption_at_any_token_continues_identically(model_path: str, model: Any) -> None:
    start = prompt(12, seed=68)
    expected = greedy_reference(model, start, tokens=111)
    assert len(expected) == 111
    engine = make_engine(model_path, num_slots=len(expected))
    engine.add(request(1000, prompt(30, seed=5), limit=150, remaining=400))  # in company
    cuts = range(1, len(expected))
    for cut in cuts:
        engine.add(request(cut, start, temperature=0.0, limit=cut, remaining=111))
    first = Record().run(engine)
    for cut in cuts:
        assert first.tokens[cut] == expected[:cut]
        engine.abort(cut)
        engine.add(request(cut, start + expected[:cut], temperature=0.0, remaining=111 - cut))
    second = Record().run(engine)
    assert all(first.tokens[cut] + second.tokens[cut] == expected for cut in cuts)


def test_limit_pauses_and_extend_resumes_exactly(model_path: str, model: Any) -> None:
    engine = make_engine(model_path)
    prompts = [prompt(length, seed=50 + length) for length in (12, 3, 25, 40)]
    expected = [greedy_reference(model, tokens, tokens=24) for tokens in prompts]
    for i, tokens in enumerate(prompts):
        engine.add(request(i, tokens, temperature=0.0, limit=2 * i, remaining=24))
    record = Record().run(engine)
    assert engine.active() == 0 and engine.step() == []
    assert [len(record.tokens.get(i, [])) for i in range(4)] == [min(2 * i, len(expected[i])) for i in range(4)]
    before = engine.prefill_tokens
    for turn in range(100):
        paused = [i for i in range(4) if i not in record.stops]
        if not paused:
            break
        for i in paused[turn % 2 :: 2] or paused:
            engine.extend(i, 1 + (turn + i) % 4)
        record.run(engine)
    assert [record.tokens[i] for i in range(4)] == expected
    assert engine.prefill_tokens - before == len(prompts[0]) - 1, "a resumed sequence was prefilled again"


def test_extend_to_zero_pauses(model_path: str) -> None:
    engine = make_engine(model_path)
    engine.add(request(0, [5, 6]))
    engine.extend(0, 0)
    assert engine.active() == 0 and engine.step() == []
    with pytest.raises(ValueError, match="sequence 7 is not held"):
        engine.extend(7, 1)


def test_stop_and_length(model_path: str) -> None:
    engine = make_engine(model_path, num_slots=64)
    record, lengths = Record(), {}
    for i in range(192):
        lengths[i] = 1 + i % 50
        engine.add(request(i, prompt(1 + i % 9, seed=i), temperature=2.0, remaining=lengths[i], limit=lengths[i]))
        while engine.active() == engine.num_slots:
            record.take(engine.step())
    record.run(engine)
    assert {"stop", "length"} == set(record.stops.values())
    for i, tokens in record.tokens.items():
        assert EOS not in tokens[:-1]
        assert record.stops[i] == ("stop" if tokens[-1] == EOS else "length")
        assert len(tokens) == lengths[i] or record.stops[i] == "stop"
    assert engine.active() == 0 and engine.step() == []


def test_slots_and_requests_are_checked(model_path: str) -> None:
    engine = make_engine(model_path, num_slots=2)
    engine.abort(99)
    engine.add(request(0, [3]))
    with pytest.raises(ValueError, match="sequence 0 is held already"):
        engine.add(request(0, [3]))
    engine.add(request(1, [3], limit=0))
    with pytest.raises(ValueError, match="all 2 slots"):
        engine.add(request(2, [3]))
    engine.abort(1)
    for bad in (request(3, []), request(3, [3], remaining=0), request(3, [3], temperature=-1.0)):
        with pytest.raises(ValueError, match="sequence 3"):
            engine.add(bad)
    with pytest.raises(ValueError, match="may reach 513 tokens, the engine has positions for 512"):
        engine.add(request(3, [3], remaining=512))


def test_long_prompts_in_chunks_equal_full_forward(
    model_path: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmdflow.rollout.engines.transformers.engine._PREFILL_TOKENS", 32)
    engine = make_engine(model_path)
    prompts = [prompt(length, seed=length) for length in (200, 3, 90, 31, 33, 32, 150, 1)]
    record = Record()
    for i, tokens in enumerate(prompts):
        engine.add(request(i, tokens, remaining=12))
        record.take(engine.step())
    record.run(engine)
    assert engine.prefill_tokens == sum(len(tokens) - 1 for tokens in prompts)
    for i, tokens in enumerate(prompts):
        expected = full_logprobs(model, tokens, record.tokens[i], temperature=1.0)
        np.testing.assert_allclose(record.logprobs[i], expected, atol=LOGPROB_ATOL)


def test_long_prefill_does_not_stop_the_others(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmdflow.rollout.engines.transformers.engine._PREFILL_TOKENS", 32)
    engine = make_engine(model_path)
    engine.add(request(0, [5, 6, 7], remaining=100, temperature=0.0))
    engine.step()
    engine.add(request(1, prompt(200, seed=1), remaining=5))
    seen = [{output.id for output in engine.step()} for _ in range(7)]
    assert all(0 in ids for ids in seen)
    assert 1 not in seen[0] and 1 in seen[-1]


def test_top_p_keeps_the_log_prob_of_the_whole_distribution(model_path: str, model: Any) -> None:
    engine = make_engine(model_path)
    for i in range(4):
        engine.add(request(i, [3 + i, 4], temperature=0.9, top_p=0.3 + 0.2 * i, remaining=15))
    record = Record().run(engine)
    for i in range(4):
        expected = full_logprobs(model, [3 + i, 4], record.tokens[i], temperature=0.9)
        np.testing.assert_allclose(record.logprobs[i], expected, atol=LOGPROB_ATOL)


def test_same_seed_same_tokens(model_path: str) -> None:
    def generate(seed: int) -> dict[int, list[int]]:
        engine = make_engine(model_path, seed=seed)
        for i in range(4):
            engine.add(request(i, [3 + i, 4], remaining=15))
        return Record().run(engine).tokens

    assert generate(1) == generate(1) != generate(2)


def test_models_that_keep_more_than_keys_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 64}
    MambaForCausalLM(MambaConfig(**sizes, eos_token_id=EOS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a mamba, has a recurrent state.*rollout\.engine=vllm"):
        make_engine(str(tmp_path))
