"""New weights in the transformers engine: what a held sequence goes on from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pmdflow.errors import PmdflowError
from tests.support.engine import (
    LOGPROB_ATOL,
    Record,
    full_logprobs,
    greedy_reference,
    make_engine,
    prompt,
    request,
    tiny_model,
)


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
        np.testing.assert_allclose(new.logprobs[i], expected, atol=LOGPROB_ATOL)


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


def test_weights_that_diverged_are_an_error(model_path: str, model: Any) -> None:
    engine = make_engine(model_path)
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in model.state_dict().items()}
    engine.load_weights(3, weights, on_new_weights="keep_kv")
    engine.add(request(0, [4, 5]))
    with pytest.raises(PmdflowError, match="policy version 3 are not finite"):
        engine.step()
