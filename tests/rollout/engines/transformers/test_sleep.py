"""An engine that sleeps holds no memory, and goes on with the same tokens when it wakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from tests.support.engine import Record, make_engine, prompt, request, tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_model(seed=0).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    return str(folder)


def generate(engine: TransformersEngine, *, temperature: float, naps: frozenset[int]) -> Record:
    record = Record()
    for id in range(3):
        engine.add(request(id, prompt(20 + 30 * id, seed=id), temperature=temperature))
    for step in range(60):
        if step in naps:
            engine.sleep()
            assert held_bytes(engine) == 0
            if step == min(naps):
                engine.add(request(3, prompt(5, seed=3), temperature=temperature))
                engine.abort(1)
            engine.wake()
        elif not naps and step == 4:
            engine.add(request(3, prompt(5, seed=3), temperature=temperature))
            engine.abort(1)
        record.take(engine.step())
    return record


def held_bytes(engine: TransformersEngine) -> int:
    model = engine._model
    tensors = [
        *model._model.parameters(),
        *model._model.buffers(),
        *(own for pair in model._cache._pairs for own in pair),
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nap_changes_no_token(path: str, temperature: float) -> None:
    expected = generate(make_engine(path), temperature=temperature, naps=frozenset())
    found = generate(make_engine(path), temperature=temperature, naps=frozenset({4, 9}))
    assert found.tokens == expected.tokens and found.stops == expected.stops
    for id, logprobs in expected.logprobs.items():
        assert found.logprobs[id] == pytest.approx(logprobs, abs=1e-4)
    assert len(expected.tokens) == 4


def test_what_is_prefilled_again_is_counted(path: str) -> None:
    engine = make_engine(path)
    engine.add(request(0, prompt(20, seed=0)))
    engine.step()
    before = engine.prefill_tokens
    engine.sleep()
    engine.wake()
    engine.step()
    assert engine.prefill_tokens == before + 20


def test_new_weights_are_taken_after_waking(path: str) -> None:
    engine, other = make_engine(path), tiny_model(seed=5)
    engine.add(request(0, prompt(20, seed=0), temperature=0.0))
    engine.step()
    engine.sleep()
    engine.wake()
    engine.load_weights(1, other.state_dict(), on_new_weights="keep_kv")
    tokens = [token for _ in range(4) for output in engine.step() for token in output.tokens]
    history = engine._sequences[0].tokens[:21]
    with torch.no_grad():  # nothing of the old weights is in what it has cached since
        for token in tokens:
            assert int(other(input_ids=torch.tensor([history])).logits[0, -1].argmax()) == token
            history.append(token)
