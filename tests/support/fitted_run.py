"""A run whose engine and learner have known times: what models are fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pmdflow.metrics.spans import SpanBuffer
from tests.support.fixture_run import FixtureRun

STEP_S, SEQUENCE_S, FACTOR = 0.004, 0.0005, 1.5
CONTEXT_S, PREFILL_S = 2e-7, 1e-4


def fitted_run(run_dir: Path) -> Path:
    """Ten iterations of 4 s; `rollout-2` generates alone at their beginning, and longer beside the learner later."""
    fixture = FixtureRun(run_dir, iterations=10, start=1e9)
    rng = np.random.default_rng(0)
    with open(fixture.run_dir / "config.yaml", "a") as config:
        config.write("reward: {functions: [{function: 'pmdflow.reward.reasoning_gym:score'}]}\n")
    for _ in range(10):
        begin = fixture.now
        fixture.iterate()
        spans = SpanBuffer("rollout-2")
        for offset, factor in ((0.1, 1.0), (0.7, 1.0), (1.8, FACTOR)):
            steps = int(rng.integers(10, 40))
            tokens = steps * int(rng.integers(1, 17))
            did = {"steps": steps, "tokens": tokens, "context": int(rng.integers(100, 4000))}
            did["prefilled"] = int(rng.integers(0, 300))
            seconds = STEP_S * steps + SEQUENCE_S * tokens + CONTEXT_S * steps * did["context"]
            seconds = (seconds + PREFILL_S * did["prefilled"]) * factor
            spans.add("generate", begin + offset, begin + offset + seconds, version=0, **did)
        fixture.recorder.spans(spans.drain())
    fixture.finish()
    return fixture.run_dir
