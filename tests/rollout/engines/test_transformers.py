"""The transformers engine against the plain model: same tokens, same log-probs, whatever the company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from pmdflow.errors import PmdflowError
from pmdflow.rollout.engine import Output, Request, RolloutEngine
from pmdflow.rollout.engines.simulated import SimulatedEngine
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.rollout.engines.transformers.sampling import sample
from pmdflow.rollout.engines.transformers.slots import HeldSequence, plan_slots

VOCAB = 384
EOS = 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(*, seed: int, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
        # Large enough that the distribution is peaked: log-probs and greedy choices then depend on the context.
        initializer_range=0.08,
    )
    model: PreTrainedModel = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny-qwen3")
    tiny_model(seed=0).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(model_path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


def make_engine(model_path: str, *, num_slots: int = 8, seed: int = 0) -> TransformersEngine:
    return TransformersEngine(
        model_path=model_path, dtype="float32", num_slots=num_slots, threads=1, seed=seed, device="cpu"
    )


def request(id: int, tokens: Any, *, limit: int = 1000, remaining: int = 20, **more: Any) -> Request:
    return Request(
        id=id, tokens=np.asarray(tokens, np.int32), limit=limit, remaining=remaining, **({"temperature": 1.0} | more)
    )


def prompt(length: int, *, seed: int) -> list[int]:
    result: list[int] = np.random.default_rng(seed).integers(2, VOCAB, length).tolist()
    return result


class Record:
    """Collects what an engine gives out, by sequence."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.stops: dict[int, str] = {}

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.id not in self.stops, "a stopped sequence generated again"
            self.tokens.setdefault(output.id, []).extend(output.tokens)
            self.logprobs.setdefault(output.id, []).extend(output.logprobs)
            if output.stop is not None:
                self.stops[output.id] = output.stop

    def run(self, engine: RolloutEngine, *, steps: int = 10_000) -> Record:
        for _ in range(steps):
            outputs = engine.step()
            if not outputs:
                break
            self.take(outputs)
        return self


def full_logprobs(model: Any, prompt: list[int], tokens: list[int], *, temperature: float) -> torch.Tensor:
    """Log-probs of `tokens` after `prompt` by one uncached forward pass."""
    ids = torch.tensor([prompt + tokens])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    scores = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    return scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def greedy_reference(model: Any, prompt: list[int], *, tokens: int) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    result: list[int] = output[0, len(prompt) :].tolist()
    return result


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
        np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-4)


def test_greedy_equals_generate_for_mixed_lengths(model_path: str, model: Any) -> None:
    engine = make_engine(model_path)
    prompts = [prompt(length, seed=length) for length in (1, 2, 7, 33, 80, 5, 120, 18)]
    for i, tokens in enumerate(prompts):
        engine.add(request(i, tokens, temperature=0.0, remaining=10 + 7 * i))
    record = Record().run(engine)
    for i, tokens in enumerate(prompts):
        assert record.tokens[i] == greedy_reference(model, tokens, tokens=10 + 7 * i)


def test_interruption_at_any_token_continues_identically(model_path: str, model: Any) -> None:
    engine = make_engine(model_path, num_slots=24)
    start = prompt(12, seed=62)
    expected = greedy_reference(model, start, tokens=111)
    cuts = range(1, 111)
    assert len(expected) == 111
    for wave in (cuts[first : first + 22] for first in range(0, len(cuts), 22)):
        engine.add(request(1000 + wave[0], prompt(30, seed=wave[0]), limit=150, remaining=400))  # in company
        for cut in wave:
            engine.add(request(cut, start, temperature=0.0, limit=cut, remaining=111))
        first = Record().run(engine)
        for cut in wave:
            assert first.tokens[cut] == expected[:cut]
            engine.abort(cut)
            engine.add(request(cut, start + expected[:cut], temperature=0.0, remaining=111 - cut))
        second = Record().run(engine)
        assert all(first.tokens[cut] + second.tokens[cut] == expected for cut in wave)
        engine.abort(1000 + wave[0])


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


def test_reprefill_uses_new_weights_for_the_whole_prefix(model_path: str, model: Any) -> None:
    engine = make_engine(model_path)
    prompts = [prompt(length, seed=length) for length in (6, 50, 21)]
    for i, tokens in enumerate(prompts):
        engine.add(request(i, tokens, remaining=60, limit=15 if i == 2 else 60))
    old = Record().run(engine, steps=15)
    held = [i for i in range(3) if i not in old.stops]
    assert len(held) >= 2
    new_model = tiny_model(seed=9)
    before = engine.prefill_tokens
    engine.load_weights(4, new_model.state_dict(), on_new_weights="reprefill")
    assert engine.version == 4
    assert engine.prefill_tokens - before == sum(len(prompts[i]) + len(old.tokens[i]) - 1 for i in held)
    if 2 in held:
        engine.extend(2, 30)
    new = Record().run(engine)
    for i in held:
        prefix = prompts[i] + old.tokens[i]
        expected = full_logprobs(new_model, prefix, new.tokens[i], temperature=1.0)
        np.testing.assert_allclose(new.logprobs[i], expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["keep_kv", "finish"])
def test_keep_kv_goes_on_with_old_prefix(model_path: str, mode: Any) -> None:
    engine = make_engine(model_path)
    tokens = prompt(40, seed=1)
    engine.add(request(0, tokens, remaining=30))
    old = Record().run(engine, steps=10)
    assert 0 not in old.stops
    before = engine.prefill_tokens
    new_model = tiny_model(seed=9)
    engine.load_weights(1, new_model.state_dict(), on_new_weights=mode)
    new = Record().run(engine)
    assert engine.prefill_tokens == before
    assert np.isfinite(new.logprobs[0]).all()
    fresh = full_logprobs(new_model, tokens + old.tokens[0], new.tokens[0], temperature=1.0)
    assert np.abs(np.asarray(new.logprobs[0]) - fresh.numpy()).max() > 1e-3, "the old cache was not kept"


def test_load_weights_refuses_names_and_shapes_and_changes_nothing(model_path: str, model: Any) -> None:
    engine = make_engine(model_path)
    state = tiny_model(seed=9).state_dict()
    wrong = {"missing": dict(state), "unexpected": dict(state), "shape": dict(state)}
    del wrong["missing"]["model.norm.weight"]
    wrong["unexpected"]["model.extra.weight"] = torch.zeros(1)
    wrong["shape"]["model.norm.weight"] = torch.zeros(3)
    names = {"missing": r"missing \['model.norm", "unexpected": r"unexpected \['model.extra", "shape": "model.norm"}
    for kind, weights in wrong.items():
        with pytest.raises(ValueError, match=names[kind]):
            engine.load_weights(2, weights, on_new_weights="keep_kv")
    assert engine.version == 0
    engine.add(request(0, [9, 8, 7], temperature=0.0))
    assert Record().run(engine).tokens[0] == greedy_reference(model, [9, 8, 7], tokens=20)


def test_tied_weights_need_one_name_and_untied_both(model_path: str, tmp_path: Path) -> None:
    engine = make_engine(model_path)
    new_model = tiny_model(seed=9)
    for absent in ("lm_head.weight", "model.embed_tokens.weight"):
        weights = {name: tensor for name, tensor in new_model.state_dict().items() if name != absent}
        engine.load_weights(1, weights, on_new_weights="keep_kv")
        engine.add(request(0, [9, 8, 7], temperature=0.0))
        assert Record().run(engine).tokens[0] == greedy_reference(new_model, [9, 8, 7], tokens=20)
    untied = tiny_model(seed=2, tied=False)
    untied.save_pretrained(tmp_path)
    weights = {name: tensor for name, tensor in untied.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
        make_engine(str(tmp_path)).load_weights(1, weights, on_new_weights="keep_kv")


def test_weights_that_diverged_are_an_error(model_path: str) -> None:
    engine = make_engine(model_path)
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in engine_state(model_path).items()}
    engine.load_weights(3, weights, on_new_weights="keep_kv")
    engine.add(request(0, [4, 5]))
    with pytest.raises(PmdflowError, match="policy version 3 are not finite"):
        engine.step()


def engine_state(model_path: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    return state


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
    with pytest.raises(ValueError, match="may reach 513 tokens, the model has 512"):
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
        np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-4)


def test_long_prefill_does_not_stop_the_others(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmdflow.rollout.engines.transformers.engine._PREFILL_TOKENS", 32)
    engine = make_engine(model_path)
    engine.add(request(0, [5, 6, 7], remaining=100, temperature=0.0))
    engine.step()
    engine.add(request(1, prompt(200, seed=1), remaining=5))
    seen = [{output.id for output in engine.step()} for _ in range(7)]
    assert all(0 in ids for ids in seen)
    assert 1 not in seen[0] and 1 in seen[-1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (1.7, 0.8)])
def test_sample_draws_from_the_tempered_and_truncated_distribution(temperature: float, top_p: float) -> None:
    num_draws = 200_000
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    logits[7] = -torch.inf
    tokens, logprobs = sample(
        logits.expand(num_draws, -1),
        temperatures=torch.full((num_draws,), temperature),
        greedy=None,
        top_p=None if top_p == 1 else torch.full((num_draws,), top_p),
        generator=torch.Generator().manual_seed(0),
    )
    probs = torch.softmax(logits / temperature, dim=-1)
    torch.testing.assert_close(logprobs, probs.log()[tokens])
    ordered, index = probs.sort(descending=True)
    kept = index[: int((ordered.cumsum(0) < top_p).sum()) + 1] if top_p < 1 else index
    target = torch.zeros(40).index_copy_(0, kept, probs[kept] / probs[kept].sum())
    frequency = torch.bincount(tokens, minlength=40) / num_draws
    assert (frequency[target == 0] == 0).all()
    assert 0.5 * (frequency - target).abs().sum() < 0.01


def test_top_p_keeps_the_log_prob_of_the_whole_distribution(model_path: str, model: Any) -> None:
    engine = make_engine(model_path)
    for i in range(4):
        engine.add(request(i, [3 + i, 4], temperature=0.9, top_p=0.3 + 0.2 * i, remaining=15))
    record = Record().run(engine)
    for i in range(4):
        expected = full_logprobs(model, [3 + i, 4], record.tokens[i], temperature=0.9)
        np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-4)


def test_same_seed_same_tokens(model_path: str) -> None:
    def generate(seed: int) -> dict[int, list[int]]:
        engine = make_engine(model_path, seed=seed)
        for i in range(4):
            engine.add(request(i, [3 + i, 4], remaining=15))
        return Record().run(engine).tokens

    assert generate(1) == generate(1) != generate(2)


def test_models_without_full_attention_are_refused(tmp_path: Path) -> None:
    config = tiny_model(seed=0).config
    config.use_sliding_window, config.sliding_window = True, 16
    config.layer_types = ["full_attention", "sliding_attention"] * 2
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_attention"):
        make_engine(str(tmp_path))


def test_simulated_engine_keeps_the_same_contract() -> None:
    def generate(seed: int, order: list[int]) -> Record:
        engine: RolloutEngine = SimulatedEngine(num_slots=64, seed=seed)
        record = Record()
        for i in order:
            engine.add(request(i, [3, 4, 5], limit=3, remaining=200))
        record.run(engine)
        assert all(len(tokens) <= 3 for tokens in record.tokens.values())
        for i in set(order) - record.stops.keys():
            engine.extend(i, 1000)
        return record.run(engine)

    first = generate(0, list(range(64)))
    assert first.tokens == generate(0, list(range(64))[::-1]).tokens != generate(1, list(range(64))).tokens
    assert {"stop", "length"} == set(first.stops.values())
    for i, tokens in first.tokens.items():
        assert (first.stops[i] == "length") == (len(tokens) == 200 and tokens[-1] != SimulatedEngine.EOS)
        assert np.isfinite(first.logprobs[i]).all() and max(first.logprobs[i]) <= 0
    engine = SimulatedEngine(num_slots=1)
    engine.abort(5)
    engine.add(request(0, [1, 2]))
    with pytest.raises(ValueError, match="all 1 slots"):
        engine.add(request(1, [1, 2]))
    engine.load_weights(3, {}, on_new_weights="reprefill")
    assert (engine.version, engine.prefill_tokens) == (3, 4)


@given(data=st.data())
def test_slot_plan_is_a_permutation_that_groups_similar_lengths(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 24))
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True))
    held = [
        HeldSequence(
            id=100 + slot,
            tokens=[0] * (length + 1),
            limit=data.draw(st.integers(0, 1)),
            remaining=9,
            temperature=1.0,
            top_p=1.0,
            slot=slot,
            cached=length,
        )
        for slot in slots
        for length in [data.draw(st.integers(0, 3000))]
    ]
    ready, others = [s for s in held if s.ready], [s for s in held if not s.ready]
    plan = plan_slots(ready, others, num_slots=num_slots)
    assert len(set(plan.slots.values())) == len(held) and set(plan.slots.values()) <= set(range(num_slots))
    assert {plan.slots[s.id] for s in ready} == set(range(len(ready)))
    assert [first for first, _, _ in plan.groups] == [0, *(end for _, end, _ in plan.groups)][: len(plan.groups)]
    assert len(plan.groups) <= 3 and (not ready or plan.groups[-1][1] == len(ready))
    for s in ready:
        length = next(length for first, end, length in plan.groups if first <= plan.slots[s.id] < end)
        longest = max(other.cached + 1 for other in ready)
        assert s.cached + 1 <= length <= max(2 * (s.cached + 1), 64, longest / 2 + 1)
    again = [replace(s, slot=plan.slots[s.id]) for s in held]
    assert plan_slots([s for s in again if s.ready], [s for s in again if not s.ready], num_slots=num_slots) == plan
