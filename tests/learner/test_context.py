"""Ranks that share their rows compute what one rank does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from pmdflow.config.schema import Config
from pmdflow.learner.learner import Learner
from pmdflow.learner.result import TrainResult
from pmdflow.learner.steps import accumulate
from pmdflow.learner.sums import Sums
from pmdflow.types import Claim, TrainBatch
from tests.support.families import write_family
from tests.support.learner import (
    assert_losses_alike,
    assert_metrics_alike,
    losses,
    make_batch,
    make_config,
    step_losses,
    two_claims,
)
from tests.support.numeric import assert_trained_alike
from tests.support.ranks import Ranks

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES = ("qwen3", "gpt_oss", "gemma2", "qwen3_moe")
"""Windows; sinks; a soft cap and a head that is called whole; experts."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Their processes, which all tests share."""
    ranks = Ranks(4)
    yield ranks
    ranks.kill()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models by family, whose heads four ranks can share."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_family(family, folder / family, **SIZES, initializer_range=0.1)
    return {family: str(folder / family) for family in FAMILIES}


def gradients(rank: int, config: Config, master: str, batch: TrainBatch) -> dict[str, Any]:
    """Loss and gradient of a claim as one step, before any clipping."""
    learner = Learner(config=config, rank=rank)
    learner.setup(master)
    try:
        ready = learner._prepare(Claim.of(batch), batch.read, Sums(max_grad_norm=1.0), steps=1)
        ((plan, micros, anchors),) = zip(ready.plans, ready.steps, ready.anchors, strict=True)
        algorithm = learner._algorithm
        sums = accumulate(
            learner._policy, micros, anchors, supervised=None, algorithm=algorithm, config=learner._config, plan=plan
        )
        named = {name: parameter.grad for name, parameter in learner._policy.named_parameters()}
        whole = {name: own.full_tensor().numpy() for name, own in named.items() if isinstance(own, DTensor)}
        return {"loss": sums.loss, "entropy": sums.entropy, "micros": len(micros), **whole}
    finally:
        learner.close()
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("family", "size"), [*((family, 2) for family in FAMILIES), ("qwen3", 4), ("gpt_oss", 4)])
def test_losses_and_gradients_are_those_of_one_rank(pool: Ranks, paths: dict[str, str], family: str, size: int) -> None:
    batch = make_batch()
    (one,) = pool.call(gradients, make_config(paths[family]), batch)
    found = pool.call(gradients, make_config(paths[family], ranks=size, context_parallel=size), batch)
    assert one["micros"] == found[0]["micros"] > 1
    for rank in found:
        assert rank.keys() == one.keys()
        for name, expected in one.items():
            scale = max(float(np.abs(expected).max()), 1e-3)
            np.testing.assert_allclose(rank[name], expected, atol=1e-5 * scale, rtol=0, err_msg=name)


def test_experts_are_replayed_where_their_tokens_are(pool: Ranks, paths: dict[str, str]) -> None:
    batch, random = make_batch(), np.random.default_rng(3)
    chosen = random.permuted(np.tile(np.arange(1, 5, dtype=np.uint8), (len(batch.tokens), 2, 1)), axis=2)[..., :2]
    chosen[::7] = 0  # nothing is recorded of some
    batch = replace(batch, extra={"experts": chosen})
    (own,) = pool.call(gradients, make_config(paths["qwen3_moe"]), batch)
    (one,) = pool.call(gradients, make_config(paths["qwen3_moe"], router_replay=True), batch)
    shared = make_config(paths["qwen3_moe"], router_replay=True, ranks=4, context_parallel=4)
    found = pool.call(gradients, shared, batch)[3]
    (router,) = [name for name in one if name.endswith("layers.0.mlp.gate.weight")]
    assert np.abs(one[router] - own[router]).max() > 1e-2 * np.abs(own[router]).max()
    np.testing.assert_allclose(found[router], one[router], atol=1e-5 * np.abs(one[router]).max(), rtol=0)
    assert found["loss"] == pytest.approx(one["loss"], abs=1e-6)


@pytest.mark.parametrize("replicas", [1, 2])
def test_contexts_beside_each_other_train_the_same_curve(
    start: Any, pool: Ranks, paths: dict[str, str], replicas: int
) -> None:
    claims, settings = two_claims(), {"steps_per_iteration": 2, "veto": True, "importance_weights": "token"}
    config = make_config(paths["qwen3"], **settings)
    one = start(config)
    expected: list[TrainResult] = [one.train(claim) for claim in claims]
    settings |= {"activation_checkpointing": True, "replicas": replicas}
    shared = make_config(paths["qwen3"], ranks=4, context_parallel=2, **settings)
    found = pool.train(shared, claims)
    for rank in found:
        assert rank.metrics == found[0].metrics and rank.left_out == found[0].left_out
    assert found[0].left_out == [result.left_out for result in expected]
    for metrics, single in zip(found[0].metrics, expected, strict=True):
        assert_metrics_alike(metrics, single.metrics)
    assert_losses_alike(step_losses(found[0].metrics), losses(expected))
    assert found[0].weights is not None
    assert_trained_alike(one.weights(), found[0].weights, lr=config.learner.lr, steps=4)


@pytest.mark.parametrize("algorithm", ["opefo", "gigpo", "opd"])
def test_what_credit_asks_of_all_ranks_counts_each_row_once(
    start: Any, pool: Ranks, paths: dict[str, str], algorithm: str
) -> None:
    more = {"teacher": paths["qwen3"]} if algorithm == "opd" else {}
    config = make_config(paths["qwen3"], algorithm=algorithm, **more)
    expected = start(config).train(make_batch()).metrics
    shared = make_config(paths["qwen3"], algorithm=algorithm, ranks=2, context_parallel=2, **more)
    found = pool.train(shared, [make_batch()])
    for name, value in expected.items():
        if name.startswith("learner/credit_") or name == "learner/teacher_tokens":
            assert found[0].metrics[0][name] == pytest.approx(value, rel=1e-4), name
    assert_losses_alike(step_losses(found[0].metrics), expected["learner/step_losses"])


def test_heads_that_cannot_be_dealt_are_refused(pool: Ranks, model_path: str, tmp_path: Path) -> None:
    refusals = pool.refusals(make_config(model_path, ranks=4, context_parallel=4))  # it has 2 heads of keys and values
    assert all("a qwen3 with 2 heads" in text and "a divisor of 2" in text for text in refusals) and len(refusals) == 4
