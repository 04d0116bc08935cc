"""The learner's tiny random Qwen3, its settings, claims made up for it, and what two ways to train it may differ by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pmdflow.config.schema import Config
from pmdflow.learner.result import TrainResult
from pmdflow.types import Mask, TrainBatch
from tests.support.numeric import assert_close

VOCAB = 128
ROUNDINGS = 14 * VOCAB
"""On the way to a log-prob: six sums in each of two layers and two more, of at most so many terms."""
LOGPROB_SIZE = 1 / 0.8
"""What rounding is relative to in a log-prob: the products that a logit adds come to about 1, the logarithm makes the
relative error of the sum of exponentials an absolute one, and a temperature divides both."""
U_SIZE = LOGPROB_SIZE * (2 * 14) ** 0.5
"""u adds at most 14 differences of two log-probs, which round independently."""
METRIC_SIZES = {
    "learner/loss": LOGPROB_SIZE,  # its derivative by all log-probs together is at most |A| = 1
    "learner/step_losses": LOGPROB_SIZE,
    "learner/grad_norm": 4 * LOGPROB_SIZE,  # of sequences of either sign, which cancel most of what they add
    "learner/ptx_loss": LOGPROB_SIZE,
    "learner/entropy": LOGPROB_SIZE,
    "learner/mismatch_kl": LOGPROB_SIZE,
    "learner/behavior_kl_by_age": LOGPROB_SIZE,
    "learner/reference_kl": U_SIZE,
    "learner/u_mean": U_SIZE,
    "learner/u_std": U_SIZE,  # no further apart than the root mean square of the differences in u
    "learner/importance_mean": 2 * U_SIZE,  # a weight is at most 2, its relative error that of its log-ratio
    "learner/importance_ess_share": 2 * U_SIZE,
}
"""What rounding in the log-probs amounts to in a metric."""


def assert_metrics_alike(found: Mapping[str, Any], expected: Mapping[str, Any], *, size: float = 1.0) -> None:
    """Assert that a learner reports what is expected, up to rounding where it computes and exactly where it counts.

    Args:
        found: All that it reports.
        expected: All or a part of it.
        size: Of what the loss and its gradient are made of, relative to PMD with advantages up to 1 and u near 0.
    """
    for key, value in expected.items():
        if value is None or key not in METRIC_SIZES:
            assert found[key] == value, key
        elif isinstance(value, list):
            assert [one is None for one in found[key]] == [one is None for one in value], key
            known = [(one, other) for one, other in zip(found[key], value, strict=True) if other is not None]
            assert_close(
                *map(list, zip(*known, strict=True)), roundings=ROUNDINGS, size=size * METRIC_SIZES[key], name=key
            )
        else:
            assert_close(found[key], value, roundings=ROUNDINGS, size=size * METRIC_SIZES[key], name=key)


def assert_losses_alike(found: Iterable[float], expected: Iterable[float]) -> None:
    """Assert that steps of PMD have the same losses, up to rounding in the log-probs."""
    assert_close(list(found), list(expected), roundings=ROUNDINGS, size=LOGPROB_SIZE)


def write_model(path: Path) -> str:
    """Save the model; where it is."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,  # engines want one; no batch here holds it
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def make_config(model_path: str, *, dtype: str = "float32", length_weight: float = 0.0, **learner) -> Config:
    defaults = {
        "tau": 0.5, "aggregation": "seq-mean-token-mean", "steps_per_iteration": 2, "tokens_per_microbatch": 64,
        "lr": 1e-3, "max_grad_norm": 10.0, "ranks": 1,
    }  # fmt: skip
    return Config.model_validate(
        {
            "run": {"name": "test", "iterations": 4},
            "model": {"path": model_path, "dtype": dtype},
            "rollout": {"engine": "transformers", "actors": 1},
            "data": {"task": "reasoning_gym/chain_sum", "group_size": 3, "max_tokens": 16},
            "reward": {"functions": [{"function": "a:b"}], "length_weight": length_weight},
            "scheduler": {"groups_per_iteration": 6, "tokens_per_iteration": 1000},
            "learner": {**defaults, **learner},
        }
    )


def make_batch(*, seed: int = 0, version: int = 2, groups: int = 6, trained: bool = True) -> TrainBatch:
    """Groups of 3, tokens of versions 0 to `version`; version 0 is over-age, and trajectory 4 wholly untrained."""
    random = np.random.default_rng(seed)
    num = groups * 3
    columns = {name: [] for name in ("tokens", "logprobs", "versions", "temperatures", "mask")}
    prompts, ends = random.integers(2, 6, num), [0]
    for index in range(num):
        length = int(random.integers(1, 15))
        versions = np.sort(random.integers(0, version + 1, length))
        flags = np.where(versions > 0, Mask.GENERATED | Mask.TRAINED, Mask.GENERATED | Mask.OVER_AGE)
        if index == 4 or not trained:
            flags[:] = Mask.GENERATED | Mask.OVER_AGE
        if length > 6:
            flags[3] = 0  # an observed token
        pad = [0] * prompts[index]
        columns["tokens"] += random.integers(1, VOCAB, prompts[index] + length).tolist()
        columns["logprobs"] += [*pad, *(-4 + random.standard_normal(length))]
        columns["versions"] += [-1 for _ in pad] + versions.tolist()
        columns["temperatures"] += [1.0 for _ in pad] + [0.8] * length
        columns["mask"] += [*pad, *flags.tolist()]
        ends.append(len(columns["tokens"]))
    return TrainBatch(
        iteration=1,
        version=version,
        tokens=np.array(columns["tokens"], np.int32),
        logprobs=np.array(columns["logprobs"], np.float32),
        versions=np.array(columns["versions"], np.int32),
        temperatures=np.array(columns["temperatures"], np.float32),
        mask=np.array(columns["mask"], np.uint8),
        cu_seqlens=np.array(ends, np.int64),
        prompt_lengths=prompts.astype(np.int32),
        groups=np.repeat(np.arange(groups), 3),
        trajectories=np.arange(num),
        rewards=random.integers(0, 2, num).astype(np.float64),
        components={},
        stops=np.ones(num, np.uint8),
        prompt_ids=tuple(f"p{index // 3}" for index in range(num)),
    )


def same_weights(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether all are equal bit for bit."""
    return all(torch.equal(first[name], second[name]) for name in first)


def losses(results: Iterable[TrainResult]) -> list[float]:
    """Of all steps of several iterations."""
    return step_losses(result.metrics for result in results)


def step_losses(metrics: Iterable[Mapping[str, Any]]) -> list[float]:
    """Of all steps of several iterations, from their metrics."""
    return [loss for values in metrics for loss in values["learner/step_losses"]]


def two_claims() -> list[TrainBatch]:
    """A veto drops trajectories 2 and 7 of the first; the second trains one alone and has empty steps."""
    first = make_batch(seed=0)
    for index in (2, 7):
        begin = first.cu_seqlens[index]
        first.logprobs[begin + np.flatnonzero(first.mask[begin : first.cu_seqlens[index + 1]] & Mask.TRAINED)[0]] = 9.0
    lonely = make_batch(seed=1, groups=2)
    lonely.mask[lonely.cu_seqlens[1] : lonely.cu_seqlens[3]] &= ~np.uint8(Mask.TRAINED)
    return [first, lonely]


def write_teacher(folder: Path, student: str | Path, *, by: float) -> str:
    """The student with other weights in its last layer."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        for parameter in model.model.layers[-1].parameters():
            parameter.add_(by * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)
