"""What changes memory or speed only: micro-batches, packing, recomputation, offloading, compiling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig
from transformers.models.mistral.modeling_mistral import MistralAttention

from pmdflow.learner.attention import Packed, packed_attention
from pmdflow.learner.learner import Learner
from pmdflow.learner.result import TrainResult
from tests.support.learner import (
    ROUNDINGS,
    U_SIZE,
    assert_losses_alike,
    assert_metrics_alike,
    losses,
    make_batch,
    make_config,
)
from tests.support.numeric import assert_close, assert_trained_alike, rounding

torch.set_num_threads(1)


def test_micro_batches_do_not_change_the_result(start, model_path):
    configs = [make_config(model_path, tokens_per_microbatch=limit) for limit in (20, 57, 4096)]
    results = [start(config).train(make_batch()).metrics for config in configs]
    for metrics in results[1:]:
        assert metrics.keys() == results[0].keys()
        assert_metrics_alike(metrics, results[0])


def gradients_of(learner: Learner, config, batch) -> dict[str, torch.Tensor]:
    """The whole gradient of the first step, before clipping and the optimizer."""
    seen = {}

    def keep() -> None:
        for name, parameter in learner._policy.named_parameters():
            seen.setdefault(name, parameter.grad.full_tensor().clone())

    learner._optimizer.register_step_pre_hook(lambda *_: keep())
    learner.train(batch)
    return seen


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batch_sizes_do_not_change_gradients(start, model_path, packing):
    found = []
    for limit in (20, 57, 4096):
        # No clipping: its factor would hide a wrong scale.
        config = make_config(model_path, tokens_per_microbatch=limit, packing=packing, max_grad_norm=1e9)
        found.append(gradients_of(start(config), config, make_batch()))
    worst = 0.0
    for other in found[1:]:
        for name, gradient in found[0].items():
            worst = max(worst, float((other[name] - gradient).norm() / gradient.norm()))
    # Forward and backward round equally often; sequences of either sign cancel three quarters of what they add.
    assert worst < 4 * rounding(2 * ROUNDINGS)


@pytest.mark.parametrize("name", ["token_pmd", "ctpo", "weighted_sft", "gspo"])
def test_other_algorithms_do_not_depend_on_the_split(start, model_path, name):
    found = []
    for limit in (20, 4096):
        learner = start(make_config(model_path, algorithm=name, tokens_per_microbatch=limit))
        found.append(losses([learner.train(make_batch())]))
    assert_close(*found, roundings=ROUNDINGS, size=U_SIZE)  # ratios of prefixes and sequences add up to 14 log-ratios


def test_packed_and_padded_rows_train_alike(start, model_path):
    results: list[list[TrainResult]] = []
    weights: list[dict[str, torch.Tensor]] = []
    for packing in (True, False):
        learner = start(make_config(model_path, packing=packing))
        results.append([learner.train(make_batch(seed=seed)) for seed in (0, 1)])
        weights.append(learner.weights())
    assert_losses_alike(losses(results[0]), losses(results[1]))
    assert_trained_alike(weights[0], weights[1], lr=1e-3, steps=4)


@pytest.mark.parametrize(
    "option", ["activation_checkpointing", "cpu_offload", pytest.param("compile", marks=pytest.mark.nightly)]
)
def test_options_change_memory_or_speed_only(start, model_path, option):
    plain = start(make_config(model_path))
    expected, weights = losses([plain.train(make_batch())]), plain.weights()
    learner = start(make_config(model_path, **{option: True}))
    assert_losses_alike(losses([learner.train(make_batch())]), expected)
    assert_trained_alike(learner.weights(), weights, lr=1e-3, steps=2)


def test_a_model_with_a_recurrent_state_is_refused_unless_padded(start, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 128}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a mamba, has a recurrent state.*set it to false"):
        start(make_config(str(tmp_path)))
    torch.distributed.destroy_process_group()
    learner = start(make_config(str(tmp_path), packing=False))
    assert np.isfinite(learner.train(make_batch()).metrics["learner/grad_norm"])


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attention_is_called_with_what_it_takes(window):
    """Without a GPU only the arguments and the shapes can be seen: on fake CUDA tensors."""
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        query = torch.empty(1, 4, 10, 16, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.empty(1, 2, 10, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        packed = Packed.of((4, 6), torch.device("cuda"))
        layer = MistralAttention(MistralConfig(hidden_size=64, head_dim=16, sliding_window=window), layer_idx=0)
        given = {"packed": packed, "scaling": 0.25, "sliding_window": window}
        output, _ = packed_attention(layer, query, key, value, None, **given)
    assert output.shape == (1, 10, 4, 16)
    assert (output.dtype, output.device.type) == (torch.bfloat16, "cuda")
