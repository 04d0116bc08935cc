"""The learner's engine: packing, chunked scores, ranks and replicas, memory options, adapters, resuming."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from pmdflow.errors import PmdflowError
from pmdflow.learner import token_scores
from pmdflow.learner.attention import Packed, packed_attention
from pmdflow.learner.learner import Learner
from pmdflow.learner.result import TrainResult
from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.weights.lora import AdapterMerger
from tests.learner.test_learner import iterations, make_batch, make_config, model_path, same_weights, start
from tests.support.paths import ROOT, SUPPORT
from tests.support.resumed_learner import ITERATIONS, write_claims

__all__ = ["model_path", "start"]  # fixtures
torch.set_num_threads(1)


def losses(results) -> list[float]:
    return [loss for result in results for loss in result.metrics["learner/step_losses"]]


# ---- chunked scores


def naive_scores(hidden, weight, bias, targets, temperatures):
    values = log_softmax((hidden @ weight.T + bias) / temperatures[:, None], 1)
    return values.gather(1, targets[:, None])[:, 0], -(values.exp() * values).sum(1)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_scores_and_gradients_do_not_depend_on_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(token_scores, "LOGITS_PER_CHUNK", chunk * 11)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((7, 5), (11, 5), (11,))]
    targets, temperatures = torch.randint(0, 11, (7,)), torch.rand(7) + 0.5
    upstream = torch.randn(2, 7)
    for used in ((0, 1), (0,), (1,)):
        ours = token_scores.token_scores(*inputs, targets, temperatures)
        naive = naive_scores(*inputs, targets, temperatures)
        for index in used:
            torch.testing.assert_close(ours[index], naive[index])
        wanted = [
            torch.autograd.grad(sum((upstream[i] * scores[i]).sum() for i in used), inputs) for scores in (ours, naive)
        ]
        for gradient, expected in zip(*wanted, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch):
    monkeypatch.setattr(token_scores, "LOGITS_PER_CHUNK", 16 * 100)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight = torch.randn(640, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with Watch():
        scores = token_scores.token_scores(hidden, weight, None, torch.zeros(640, dtype=torch.int64), torch.ones(640))
        (scores.logprobs.sum() + scores.entropies.sum()).backward()
    assert largest <= 640 * 4, "hidden states are the largest, not 640 x 100 logits"


# ---- packing


def test_packed_and_padded_rows_train_alike(start, model_path):
    results: list[list[TrainResult]] = []
    weights: list[dict[str, torch.Tensor]] = []
    for packing in (True, False):
        learner = start(make_config(model_path, packing=packing))
        results.append([learner.train(make_batch(seed=seed)) for seed in (0, 1)])
        weights.append(learner.weights())
    np.testing.assert_allclose(losses(results[0]), losses(results[1]), rtol=1e-5)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=2e-4)


def test_a_model_with_other_attention_is_refused_unless_padded(start, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a sliding window.*set it to false"):
        start(make_config(str(tmp_path)))
    torch.distributed.destroy_process_group()
    learner = start(make_config(str(tmp_path), packing=False))
    assert np.isfinite(learner.train(make_batch()).metrics["learner/grad_norm"])


def test_flash_attention_is_called_with_what_it_takes():
    """Without a GPU only the arguments and the shapes can be seen: on fake CUDA tensors."""
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        query = torch.empty(1, 4, 10, 16, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.empty(1, 2, 10, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        packed = Packed.of((4, 6), torch.device("cuda"))
        output, _ = packed_attention(torch.nn.Module(), query, key, value, None, packed=packed, scaling=0.25)
    assert output.shape == (1, 10, 4, 16)
    assert (output.dtype, output.device.type) == (torch.bfloat16, "cuda")


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
    print(f"largest relative difference of a parameter's gradient: {worst:.1e}")
    assert worst < 1e-5


# ---- memory and speed options


@pytest.mark.parametrize(
    "option", ["activation_checkpointing", "cpu_offload", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_options_change_memory_or_speed_only(start, model_path, option):
    plain = start(make_config(model_path))
    expected, weights = losses([plain.train(make_batch())]), plain.weights()
    learner = start(make_config(model_path, **{option: True}))
    np.testing.assert_allclose(losses([learner.train(make_batch())]), expected, rtol=1e-5)
    for name, tensor in learner.weights().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=2e-4)


def test_replicas_must_divide_the_ranks(model_path):
    with pytest.raises(ValidationError, match=r"learner\.ranks \(4\) is not a multiple of learner\.replicas \(3\)"):
        make_config(model_path, ranks=4, replicas=3)


# ---- ranks


def rank_main(rank: int, config, master: str, directory: str) -> None:
    """Load if there is something, two iterations, save; what it saw goes to a file."""
    learner = Learner(config=config, rank=rank)
    learner.setup(master)
    if Path(directory, "load").exists():
        learner.load(f"{directory}/load")
    results = [learner.train(batch) for batch in iterations()]
    learner.save(f"{directory}/saved")
    learner.await_saved()
    if rank == 0:
        torch.save(losses(results), f"{directory}/losses.pt")
    learner.close()


def run_ranks(config, master: str, directory: Path) -> list[float]:
    directory.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(rank_main, args=(config, master, str(directory)), nprocs=config.learner.ranks)
    return torch.load(directory / "losses.pt")


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_ranks_and_replicas_give_the_same_loss_curve(start, model_path, tmp_path, ranks, replicas):
    one = start(make_config(model_path, steps_per_iteration=2))
    expected = losses([one.train(batch) for batch in iterations()])
    config = make_config(model_path, steps_per_iteration=2, ranks=ranks, replicas=replicas)
    found = run_ranks(config, one.address(), tmp_path / "ranks")
    difference = np.abs(np.array(found) / np.where(np.array(expected) == 0, 1, expected) - 1)[np.array(expected) != 0]
    print(f"{ranks} ranks, {replicas} replicas: largest relative difference of a loss {difference.max():.1e}")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_rank_resumed_by_two_and_again_by_one(start, model_path, tmp_path):
    def trained(learner, batches):
        return losses([learner.train(batch) for batch in batches])

    batches = iterations()
    whole = start(make_config(model_path))
    expected = trained(whole, batches * 3)
    first = start(make_config(model_path))
    found = trained(first, batches)
    (tmp_path / "ranks").mkdir()
    first.save(str(tmp_path / "ranks" / "load"))
    first.await_saved()
    found += run_ranks(make_config(model_path, ranks=2), first.address(), tmp_path / "ranks")
    last = start(make_config(model_path))
    last.load(str(tmp_path / "ranks" / "saved"))
    found += trained(last, batches)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


# ---- asynchronous saving


def test_a_save_holds_the_moment_it_was_asked_for(start, model_path, tmp_path):
    learner = start(make_config(model_path))
    learner.train(make_batch(seed=0))
    before = learner.weights()
    learner.save(str(tmp_path / "saved"))
    after = losses([learner.train(make_batch(seed=1))])  # while the files are written
    learner.await_saved()
    learner.load(str(tmp_path / "saved"))
    assert same_weights(learner.weights(), before)
    assert losses([learner.train(make_batch(seed=1))]) == after


def test_a_save_that_fails_says_so(start, model_path, tmp_path):
    learner = start(make_config(model_path))
    (tmp_path / "file").write_text("in the way")
    learner.save(str(tmp_path / "file" / "saved"))
    with pytest.raises(PmdflowError, match=r"rank 0: .*Not a directory"):
        learner.await_saved()
    learner.save(str(tmp_path / "saved"))
    learner.await_saved()


CHILD = SUPPORT / "resumed_learner.py"
CHILD_TIMEOUT_S = 200


def child(model: str, directory: Path, *, hold: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(CHILD), model, str(directory), str(hold)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_n_iterations_equal_n_then_sigkill_then_resume(model_path, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        write_claims(directory)
    process = child(model_path, whole, hold=0)
    process.communicate(timeout=CHILD_TIMEOUT_S)
    assert process.returncode == 0

    hold = ITERATIONS // 2 + 1
    process = child(model_path, killed, hold=hold)
    assert [process.stdout.readline() for _ in range(2)] == ["resumed 0\n", "holding\n"]
    process.send_signal(signal.SIGKILL)
    assert process.wait(CHILD_TIMEOUT_S) == -signal.SIGKILL
    process = child(model_path, killed, hold=0)
    output, _ = process.communicate(timeout=CHILD_TIMEOUT_S)
    assert process.returncode == 0
    # Iteration `hold` was trained and the one before it saved, but neither committed: both are trained again.
    assert output == f"resumed {hold - 2}\n"
    outcomes = [torch.load(directory / "final.pt") for directory in (whole, killed)]
    assert len(outcomes[0]["losses"]) == ITERATIONS
    assert outcomes[0]["losses"] == outcomes[1]["losses"], "bit for bit"
    assert same_weights(outcomes[0]["weights"], outcomes[1]["weights"])


# ---- adapters


def test_adapters_alone_are_trained_saved_and_published(start, model_path, tmp_path):
    pytest.importorskip("peft")
    lora = {"rank": 4, "alpha": 8}
    learner = start(make_config(model_path, lora=lora, lr=1e-2))
    plain = start(make_config(model_path)).train(make_batch()).metrics["learner/step_losses"]
    learner = start(make_config(model_path, lora=lora, lr=1e-2))
    results = [learner.train(make_batch(seed=seed)) for seed in (0, 1)]
    assert results[0].metrics["learner/step_losses"][0] == pytest.approx(plain[0], rel=1e-5), "B begins at 0"
    learner.save(str(tmp_path / "saved"))
    weights = learner.weights()
    expected = learner.train(make_batch(seed=2)).metrics
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    assert len(weights) == 2 * 7 * 2, "A and B of seven linear layers in two decoder layers"

    saved = FileSystemReader(tmp_path / "saved").read_metadata().state_dict_metadata
    assert all("lora_" in name for name in saved if name.startswith(("model.", "optimizer.state.")))
    learner = start(make_config(model_path, lora=lora, lr=1e-2))
    learner.load(str(tmp_path / "saved"))
    assert learner.train(make_batch(seed=2)).metrics == expected


def test_the_engine_generates_with_published_adapters(start, model_path, tmp_path):
    pytest.importorskip("peft")
    learner = start(make_config(model_path, lora={"rank": 4}, lr=3e-2))
    for seed in (0, 1):
        learner.train(make_batch(seed=seed))
    published = learner.weights()
    engine = TransformersEngine(model_path=model_path, dtype="float32", num_slots=2, threads=1, seed=0)
    for version in (1, 2):  # twice: the second must not add to the first
        engine.load_weights(version, published, on_new_weights="keep_kv")
    engine.add(Request(id=0, tokens=np.array([5, 6], np.int32), limit=8, remaining=8, temperature=0.8))
    outputs = [output for _ in range(8) for output in engine.step()]
    batch = make_batch(groups=1)
    tokens = [5, 6, *(output.tokens[0] for output in outputs)]
    generated = np.array([0, 0] + [3] * len(outputs), np.uint8)
    batch = replace(
        batch,
        tokens=np.array(tokens * 3, np.int32),
        logprobs=np.tile(np.array([0, 0, *(output.logprobs[0] for output in outputs)], np.float32), 3),
        versions=np.tile(np.where(generated, batch.version, -1).astype(np.int32), 3),
        temperatures=np.tile(np.where(generated, 0.8, 1).astype(np.float32), 3),
        mask=np.tile(generated, 3),
        cu_seqlens=np.arange(4) * len(tokens),
        prompt_lengths=np.full(3, 2, np.int32),
    )
    result = learner.train(batch)
    assert result.metrics["learner/mismatch_kl"] == pytest.approx(0, abs=1e-5)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in published.items() if "lora_B" in name)


def test_merger_names_an_unknown_layer():
    merged = AdapterMerger().merge(
        {"nothing.lora_A.weight": torch.ones(1, 2), "nothing.lora_B.weight": torch.ones(2, 1)},
        {"q.weight": torch.zeros(2, 2)},
    )
    assert "nothing.weight" in merged
