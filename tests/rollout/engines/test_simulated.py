"""The simulated engine keeps the contract of the others."""

from __future__ import annotations

import numpy as np
import pytest

from pmdflow.rollout.engine import RolloutEngine
from pmdflow.rollout.engines.simulated import SimulatedEngine
from tests.support.engine import Record, request


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
    with pytest.raises(ValueError, match="sequence 0: limit -1 is below 0"):
        engine.extend(0, -1)
    with pytest.raises(ValueError, match="sequence 7 is not held"):
        engine.extend(7, 1)
    engine.load_weights(3, {}, on_new_weights="reprefill")
    assert (engine.version, engine.prefill_tokens) == (3, 4)
