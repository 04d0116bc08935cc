"""What spans of generation say: simulated engines are fitted to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pmdflow.config.load import load
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.rollout.engines.simulated import SimulatedEngine
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.rollout.telling import Telling
from pmdflow.types import Prompt
from tests.support.filled_store import ready_store
from tests.support.paths import CONFIGS


def test_a_span_says_what_was_prefilled_and_how_long_contexts_were() -> None:
    config = load(Path(CONFIGS / "quickstart.yaml")).config
    engine = SimulatedEngine(num_slots=4, seed=0)
    holder = Holder(engine, LeaseTaker(config))
    spans = SpanBuffer("rollout-0")
    telling = Telling(spans, engine, room="environment", context=lambda: holder.context_tokens)
    store = ready_store()
    store.admit("a", Prompt(id="a", text="", tokens=np.arange(5, dtype=np.int32)), group_size=2, max_tokens=100)
    for lease in store.lease("worker", 0, 2, 0.0):
        holder.join(lease, grant=3)
        holder.fill_slots()
        telling.begin_step()
        telling.end_step(holder.step())
    telling.end_span()
    (span,) = spans.drain()
    assert span["name"] == "generate"
    did = span["attrs"]
    assert (did["steps"], did["tokens"], did["prefilled"]) == (2, 3, 5), "the second began within the span"
    assert did["context"] == (5 + 13) // 2, "one prompt of 5 tokens at the begin, two and 3 tokens more at the end"
