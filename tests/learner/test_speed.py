"""Metrics of the learner: those of the clock, the table that defines all, and the benchmark of its step."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from types import ModuleType

import numpy as np
import torch

from pmdflow.learner.flops import Speed
from pmdflow.learner.supervised import SupervisedData
from tests.support.learner import VOCAB, make_batch, make_config, same_weights
from tests.support.paths import ROOT

torch.set_num_threads(1)


def test_operations_of_a_pass():
    speed = Speed(per_token=2e6, per_square=4.0, passes=4, peak=1e9)
    assert speed.operations([10, 20]) == 4 * (2e6 * 30 + 4.0 * 500)


def test_speed_is_apart_from_the_metrics_that_repeat(start, model_path):
    result = start(make_config(model_path)).train(make_batch())
    assert result.speed["learner/tokens_per_s"] > 0
    assert result.speed["learner/mfu"] is None
    json.dumps({**result.metrics, **result.speed})


def test_every_metric_of_the_learner_is_defined_in_the_table(start, model_path):
    options = {"importance_weights": "token", "algorithm": "grpo", "entropy_weight": 0.1}
    learner = start(make_config(model_path, **options))
    learner._ptx = SupervisedData(rows=[(np.array([3], np.int32), np.array([5], np.int32))], sequences=1)
    result = learner.train(make_batch())
    text = (ROOT / "pmdflow" / "metrics" / "METRICS.md").read_text()
    keys = result.metrics.keys() | result.speed.keys()
    assert {key for key in keys if f"`{key}`" not in text} == set()
    defined = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `learner/")}
    # An algorithm's own, a scorer's; test_distillation.py has a teacher.
    defined -= {"learner/credit_*", "learner/scorer_NAME_KEY", "learner/teacher_tokens"}
    assert defined == {key for key in keys if key.startswith("learner/")}


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_learner", ROOT / "bench" / "learner.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_takes_the_steps_of_the_learner(model_path):
    script = benchmark()
    sizes = {"sequences": 4, "longest": 64, "microbatch": 128, "threads": 1, "dtype": "float32", "seed": 0}
    args = Namespace(**sizes, compile=False, activation_checkpointing=False)
    batch = script.make_batch(args, VOCAB)
    ours = script.Ours(script.make_config(args, model_path, batch), batch)
    before = ours.learner.weights()
    ours.step()
    ours.reference()
    assert not same_weights(before, ours.learner.weights())
    ours.learner.close()
