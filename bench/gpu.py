"""What must be true before anyone is told that pmdflow runs on a GPU: ten items, one GPU, about ten minutes.

    python bench/gpu.py --json gpu.json        # on a machine with one GPU: torch and transformers, no Ray, no vLLM
    python bench/gpu.py --cpu --json dry.json  # the same code on a tiny model, to see that it runs
    python bench/gpu.py publication speed      # these items alone

Models have random weights of the shapes of Qwen3, made here: nothing is downloaded. Each item runs in a process of its
own, forked before anything touches CUDA, with a deadline; what it has found is in the file as soon as it is found, so
neither a crash nor a hang takes anything away. An item that needs what is not there is skipped by name. `missed` lists
the goals that were not reached; the exit status is 1 if an item failed or missed one.

Not covered by one GPU: NCCL between GPUs, hybrid sharding, vLLM, placement by Ray.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging

from pmdflow.config.memory import CONTEXT_BYTES, rank_need
from pmdflow.config.schema import Config
from pmdflow.learner.attention import ATTENTION, Packed, packed_attention
from pmdflow.learner.footprint import measure_apart
from pmdflow.learner.learner import Learner
from pmdflow.learner.policy import Layout, Policy
from pmdflow.learner.preparation import load_steps, plan_claim
from pmdflow.learner.steps import reference_pass
from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.types import Claim, Mask, TrainBatch
from pmdflow.weights.file import WeightsFile

SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
PRIME_RL_TOKENS_PER_S = 11_900
"""What prime-rl publishes for full fine-tuning of 0.6B on one H100, its trainer alone."""
PROMPT = 4
"""Tokens of every prompt."""

Answer = TypeVar("Answer")


class Notes:
    """What an item has found, sent to the parent at once."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send

    def __call__(self, **found: Any) -> None:
        """Record values by name."""
        self._send(found)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Record a value that has a goal."""
        self._send({name: value})
        if not value <= limit:  # NaN is missed too
            self._send({"missed": [f"{name} is {value:.4g}, not at most {limit:g}"]})

    def true(self, name: str, value: bool) -> None:
        """Record what must be true."""
        self._send({name: bool(value)})
        if not value:
            self._send({"missed": [f"{name} is false"]})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an item runs, and the models that are there."""

    cpu: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        """The one accelerator, or the CPU."""
        return torch.device("cpu" if self.cpu else "cuda")

    def pick(self, gpu: Answer, cpu: Answer) -> Answer:
        """The size for a GPU, or the one of a dry run."""
        return cpu if self.cpu else gpu

    def shape(self, name: str) -> Qwen3Config:
        """A Qwen3 of that size; in a dry run the tiny one."""
        own = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, **SHAPES[name]}
        return Qwen3Config(
            **self.pick(own, TINY), max_position_embeddings=40_960, tie_word_embeddings=True, eos_token_id=1,
            initializer_range=0.04,
        )  # fmt: skip

    def model(self, name: str) -> str:
        """The folder of a random model of that size, made by whoever wants it first."""
        folder = self.folder / name
        if not folder.exists():
            torch.manual_seed(0)
            with self.device:
                made = AutoModelForCausalLM.from_config(self.shape(name), dtype=torch.bfloat16)
            made.save_pretrained(self.folder / "making")
            (self.folder / "making").rename(folder)
            del made
            self.forget()
        return str(folder)

    def forget(self) -> None:
        """Give cached memory back and begin to count the peak anew."""
        gc.collect()
        if not self.cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def settings(self, model: str, batch: TrainBatch, **learner: Any) -> Config:
        """A run of that model whose claim is `batch`."""
        groups = len(np.unique(batch.groups))
        longest = int(np.diff(batch.cu_seqlens).max())
        defaults = {
            "ranks": 1, "steps_per_iteration": 1, "lr": 1e-6, "tau": 0.1, "threads": self.pick(8, 1),
            "tokens_per_microbatch": max(longest, self.pick(16_384, 256)), "activation_checkpointing": False,
        }  # fmt: skip
        return Config.model_validate(
            {
                "run": {"name": "gpu", "iterations": 1},
                "model": {"path": model, "dtype": self.pick("bfloat16", "float32")},
                "data": {"task": "reasoning_gym/chain_sum", "group_size": 2, "max_tokens": longest - PROMPT},
                "reward": {"functions": [{"function": "a:b"}]},
                "rollout": {"engine": "transformers", "actors": 1},
                "scheduler": {"groups_per_iteration": groups, "tokens_per_iteration": len(batch.tokens)},
                "learner": {**defaults, **learner},
                "store": {"max_bytes": "1024GiB"},
            }
        )


def claim_of(lengths: Sequence[int], *, vocab: int, seed: int = 0) -> TrainBatch:
    """A claim of sequences of so many tokens, two a group, of which one has a reward."""
    rng = np.random.default_rng(seed)
    count, ends = len(lengths), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(ends[-1])
    mask = np.full(total, Mask.GENERATED | Mask.TRAINED, np.uint8)
    for start in ends[:-1]:
        mask[start : start + PROMPT] = 0
    return TrainBatch(
        iteration=1,
        version=0,
        tokens=rng.integers(2, vocab, total).astype(np.int32),
        logprobs=np.where(mask, -np.log(vocab), 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        temperatures=np.ones(total, np.float32),
        mask=mask,
        cu_seqlens=ends,
        prompt_lengths=np.full(count, PROMPT, np.int32),
        groups=np.arange(count) // 2,
        trajectories=np.arange(count),
        rewards=(np.arange(count) % 2).astype(np.float64),
        components={},
        stops=np.ones(count, np.uint8),
        prompt_ids=tuple(f"p{index // 2}" for index in range(count)),
    )


@contextmanager
def opened(config: Config, *, device: torch.device | None = None) -> Iterator[Learner]:
    """A learner of one rank, in a process group of its own."""
    learner = Learner(config=config, rank=0)
    learner._device = device or learner._device
    try:
        elsewhere(lambda: learner.setup(learner.address()))
        torch.use_deterministic_algorithms(False)
        yield learner
    finally:
        learner.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def elsewhere(work: Callable[[], Answer]) -> Answer:
    """Do it in another thread, as Ray's threaded actors do."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def timed(work: Callable[..., Answer], *args: Any) -> tuple[float, Answer]:
    """Wall-clock seconds, all kernels done, and the answer."""
    started = time.perf_counter()
    answer = work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, answer


def fastest(times: int, work: Callable[..., object], *args: Any) -> float:
    """Seconds of the fastest of several times."""
    return min(timed(work, *args)[0] for _ in range(times))


def apart(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the differences, relative to that of what is expected."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp(min=1e-30))


def cosine(first: Tensor, second: Tensor) -> float:
    """Of the angle between two gradients."""
    return float(cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0))


# 1


def attention(place: Place, note: Notes) -> None:
    """Packed attention beside float32 SDPA of each sequence alone, forward and backward."""
    heads, shared, size = place.pick((32, 8, 128), (4, 2, 16))
    lengths = place.pick((1, 2, 17, 300, 4096, 32_768), (1, 2, 17, 64))
    _attention_case(place, note, "all", lengths, heads, shared, size, None)
    _attention_case(place, note, "window", lengths[1:4], heads, shared, size, 8)
    _attention_case(place, note, "empty", (2,), heads, shared, size, None)
    company = _made_attention(place, lengths[:4], heads, shared, size, torch.bfloat16)
    together = _packed(company, lengths[:4], None)
    single = [part[:, :, sum(lengths[:3]) : sum(lengths[:4])] for part in company]
    note.at_most("alone_and_in_company", apart(_packed(single, lengths[3:4], None), together[:, -lengths[3] :]), 5e-3)
    exact = _made_attention(place, lengths[:4], heads, shared, size, torch.float32)
    note.at_most("float32", apart(_packed(exact, lengths[:4], None), _plain(exact, lengths[:4], None)), 1e-5)


def _attention_case(
    place: Place, note: Notes, name: str, lengths: Sequence[int], heads: int, shared: int, size: int, window: int | None
) -> None:
    given = [tensor.requires_grad_() for tensor in _made_attention(place, lengths, heads, shared, size, torch.bfloat16)]
    wanted = [tensor.detach().float().requires_grad_() for tensor in given]
    found, expected = _packed(given, lengths, window), _plain(wanted, lengths, window)
    note.at_most(f"{name}_forward", apart(found, expected), 1e-2)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, given, direction.to(found.dtype))
    for part, own, other in zip("qkv", gradients, torch.autograd.grad(expected, wanted, direction), strict=True):
        note.at_most(f"{name}_backward_{part}", apart(own, other), 2e-2)


def _made_attention(
    place: Place, lengths: Sequence[int], heads: int, shared: int, size: int, dtype: torch.dtype
) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = [(1, number, sum(lengths), size) for number in (heads, shared, shared)]
    return [torch.randn(shape, device=place.device, dtype=dtype) for shape in shapes]


def _packed(given: Sequence[Tensor], lengths: Sequence[int], window: int | None) -> Tensor:
    kind = "full_attention" if window is None else "sliding_attention"
    config = Qwen3Config(
        num_hidden_layers=1, layer_types=[kind], use_sliding_window=window is not None, sliding_window=window
    )
    module: Any = SimpleNamespace(config=config, layer_idx=0)
    packed = Packed.of(tuple(lengths), given[0].device)
    return packed_attention(module, *given, None, packed=packed, sliding_window=window)[0]


def _plain(given: Sequence[Tensor], lengths: Sequence[int], window: int | None) -> Tensor:
    query, key, value = given
    copies, parts = query.shape[1] // key.shape[1], []
    for q, k, v in zip(*(tensor.split(tuple(lengths), dim=2) for tensor in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        if window is None:
            parts.append(scaled_dot_product_attention(q, k, v, is_causal=True))
        else:
            seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
            parts.append(scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return torch.cat(parts, dim=2).transpose(1, 2)


# 2


def scores(place: Place, note: Notes) -> None:
    """Log-probs and entropies of the packed bfloat16 policy beside plain float32 logits; gradients; padded rows."""
    path, lengths = place.model("1.7b"), place.pick((900, 300, 40, 5), (40, 20, 5, 2))
    torch.manual_seed(2)
    rows = [torch.randint(2, place.shape("1.7b").vocab_size, (length,)) for length in lengths]
    weights = torch.randn(sum(lengths) - len(lengths), device=place.device)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    policy = Policy(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=ATTENTION))
    for parameter in policy.parameters():  # as FSDP does: buffers such as rotary frequencies stay float32
        parameter.data = parameter.data.bfloat16()
    plain, policy = plain.to(place.device).eval(), policy.to(place.device).eval()
    for temperature in (1.0, 0.7):
        logits = [plain(row[None].to(place.device)).logits[0, :-1] / temperature for row in rows]
        logs = torch.cat([one.log_softmax(-1) for one in logits])
        targets = torch.cat([row[1:] for row in rows]).to(place.device)
        expected = logs.gather(1, targets[:, None])[:, 0]
        entropies = -(logs.exp() * logs).sum(1)
        found = _scored(place, policy, rows, temperature, packed=True)
        difference = (found.logprobs - expected).detach().double()
        note.at_most(f"logprobs_t{temperature:g}", float(difference.abs().mean()), 0.02)
        note.at_most(f"bias_t{temperature:g}", abs(float(difference.mean())), 1e-3)
        note.at_most(f"entropies_t{temperature:g}", float((found.entropies - entropies).detach().abs().mean()), 0.02)
        (found.logprobs * weights).sum().backward()
        (expected * weights).sum().backward()
        first = ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")
        for name in first:
            own = policy.model.get_parameter(name).grad, plain.get_parameter(name).grad
            note.at_most(f"one_minus_cosine_{name.split('.')[-2]}_t{temperature:g}", 1 - cosine(*own), 1e-3)
        policy.zero_grad()
        plain.zero_grad()
        del logits, logs, entropies, found
    with torch.no_grad():
        packed = _scored(place, policy, rows, 1.0, packed=True).logprobs
        policy.model.set_attn_implementation("sdpa")
        padded = _scored(place, policy, rows, 1.0, packed=False).logprobs
        note.at_most("padded_and_packed", float((padded - packed).abs().mean()), 0.02)


def _scored(place: Place, policy: Policy, rows: list[Tensor], temperature: float, *, packed: bool) -> Any:
    lengths = tuple(map(len, rows))
    tokens = torch.cat(rows)[None] if packed else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    starts = [sum(lengths[:row]) if packed else row * max(lengths) for row in range(len(rows))]
    positions = torch.cat([start + torch.arange(n - 1) for start, n in zip(starts, lengths, strict=True)])
    targets = torch.cat([row[1:] for row in rows]).to(place.device)
    layout = Layout.of(lengths, packed=packed, device=place.device)
    heat = torch.full((len(targets),), temperature, device=place.device)
    return policy(tokens.to(place.device), layout, positions.to(place.device), targets, heat)


# 3


def steps(place: Place, note: Notes) -> None:
    """A learner over NCCL, its calls from different threads: u of the first step, loss beside a CPU, odd claims."""
    path, vocab = place.model("0.6b"), place.shape("0.6b").vocab_size
    batch = claim_of(place.pick((900, 700, 300, 200, 60, 40), (40, 30, 20, 12, 9, 8)), vocab=vocab)
    ways: dict[str, dict[str, Any]] = {"plain": {}, "checkpointing": {"activation_checkpointing": True}}
    if not place.cpu:
        ways["compile"] = {"compile": True}
    seen: dict[str, dict[str, Any]] = {}
    for name, more in ways.items():
        with opened(place.settings(path, batch, **more)) as learner:
            seen[name] = elsewhere(lambda: learner.train(batch).metrics)
            published = elsewhere(lambda: learner.publish(lambda tensors, _: WeightsFile.write(tensors)))
            note.true(f"{name}_published", published is not None)
        note.at_most(f"{name}_u", max(abs(seen[name]["learner/u_mean"]), seen[name]["learner/u_std"]), 0.0)
        note(**{f"{name}_loss": seen[name]["learner/loss"], f"{name}_grad_norm": seen[name]["learner/grad_norm"]})
    plain = place.settings(path, batch)
    exact = plain.model_copy(update={"model": plain.model.model_copy(update={"dtype": "float32"})})
    with opened(exact, device=torch.device("cpu")) as learner:
        expected = learner.train(batch).metrics
    for key in ("learner/loss", "learner/grad_norm"):
        note.at_most(f"{key.removeprefix('learner/')}_off", abs(seen["plain"][key] / expected[key] - 1), 0.05)
    batch.mask[batch.cu_seqlens[2] : batch.cu_seqlens[4]] &= ~np.uint8(Mask.TRAINED)
    first = batch.cu_seqlens[0]
    batch.logprobs[first + PROMPT] = 9.0
    odd = place.settings(path, batch, steps_per_iteration=3, veto=True, max_grad_norm=1e-6)
    with opened(odd) as learner:
        result = learner.train(batch)
    note.true("skips_an_empty_step", result.metrics["learner/skipped_steps"] == 1)
    note.true("vetoes", result.left_out["veto"] == [0])
    note.true("clips", max(result.metrics["learner/clip_factors"]) < 1)


# 4


def noise(place: Place, note: Notes) -> None:
    """Standard deviation of u by length: the same weights in other micro-batches, and after one small step."""
    path, vocab = place.model("0.6b"), place.shape("0.6b").vocab_size
    sizes = place.pick((1024, 4096, 16_384), (16, 32, 64))
    batch = claim_of([size for size in sizes for _ in range(4)], vocab=vocab)
    most = len(batch.tokens)
    with opened(place.settings(path, batch, activation_checkpointing=True)) as learner:
        alone, company = (_sums(learner, batch, tokens) for tokens in (max(sizes), place.pick(2 * max(sizes), most)))
        learner.train(batch)
        stepped = _sums(learner, batch, max(sizes))
    for row, size in enumerate(sizes):
        own = slice(4 * row, 4 * row + 4)
        note(
            **{
                f"u_same_weights_{size}": float(np.std(company[own] - alone[own])),
                f"u_after_a_step_{size}": float(np.sqrt(np.mean((stepped[own] - alone[own]) ** 2))),
            }
        )
    note(advantage_over_tau=10)


def _sums(learner: Learner, batch: TrainBatch, tokens: int) -> np.ndarray[Any, Any]:
    """Sum of the log-probs of each trajectory, in micro-batches of so many tokens."""
    settings = learner._config.learner.model_copy(update={"tokens_per_microbatch": tokens})
    claim, ones = Claim.of(batch), np.ones(len(batch.rewards))
    plans = plan_claim(settings, claim, claim.count(Mask.TRAINED), steps=1, quadratic=0.0)
    (micros,) = load_steps(settings, claim, batch.read, plans, ones, rank=0, device=learner._device)
    total = np.zeros(len(batch.rewards))
    for micro, found in zip(micros, reference_pass(learner._policy, micros), strict=True):
        parts = found.logprobs.double().split(micro.cu_seqlens.diff().tolist())
        total[micro.trajectories] = [float(part.sum()) for part in parts]
    return total


# 5


def memory(place: Place, note: Notes) -> None:
    """Peak bytes of a step beside the plan, and what the allocator keeps after micro-batches of random lengths."""
    path, vocab = place.model("0.6b"), place.shape("0.6b").vocab_size
    footprint = measure_apart(path, dtype="bfloat16", packing=True)
    room = 0 if place.cpu else torch.cuda.mem_get_info()[1]
    for tokens in place.pick((8192, 16_384, 36_864), (64, 128, 256)):
        for again in (True, False):
            name, batch = f"{tokens}_{'again' if again else 'kept'}", claim_of([tokens // 4] * 8, vocab=vocab)
            more = {"tokens_per_microbatch": tokens, "activation_checkpointing": again}
            config = place.settings(path, batch, **more)
            planned = rank_need(config, footprint, on_gpu=not place.cpu).total - (0 if place.cpu else CONTEXT_BYTES)
            note(**{f"planned_{name}": planned})
            if room and planned > 0.9 * room:
                note(**{f"peak_{name}": "not tried: it does not fit by the plan"})
                continue
            place.forget()
            with opened(config) as learner:
                learner.train(batch)
                learner.train(batch)
                if not place.cpu:
                    peak = torch.cuda.max_memory_allocated()
                    note(**{f"peak_{name}": peak})
                    note.at_most(f"off_{name}", abs(planned / peak - 1), 0.15)
    free, total = (0, 0) if place.cpu else torch.cuda.mem_get_info()
    if not place.cpu:
        place.forget()
        note(context_bytes=total - free - torch.cuda.memory_reserved(), planned_context_bytes=CONTEXT_BYTES)
    for setting in ("expandable_segments:False", "expandable_segments:True"):
        _fragments(place, note, path, vocab, setting)


def _fragments(place: Place, note: Notes, path: str, vocab: int, setting: str) -> None:
    if not place.cpu:
        torch.cuda.memory._set_allocator_settings(setting)
    rng, most = np.random.default_rng(5), place.pick(16_384, 64)
    lengths = [int(length) for length in rng.integers(PROMPT + 4, most, place.pick(60, 6))]
    batch = claim_of(lengths, vocab=vocab)
    more = {"tokens_per_microbatch": most, "activation_checkpointing": True, "anchor": "behavior"}
    place.forget()
    with opened(place.settings(path, batch, **more)) as learner:
        learner.train(batch)
        if not place.cpu:
            kept = torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated()
            note(**{f"reserved_beyond_peak_{setting.partition(':')[2]}": kept})


# 6


def speed(place: Place, note: Notes) -> None:
    """Tokens a second and MFU of training alone, attention's share at full length, and two kinds of AdamW."""
    path, vocab = place.model("0.6b"), place.shape("0.6b").vocab_size
    size = place.pick(2048, 32)
    batch = claim_of([size] * 16, vocab=vocab)
    more = {"tokens_per_microbatch": place.pick(16_384, 128), "activation_checkpointing": True, "anchor": "behavior"}
    with opened(place.settings(path, batch, **more)) as learner:
        learner.train(batch)
        place.forget()
        seconds = fastest(3, learner.train, batch)
        operations = learner._speed.operations([size] * 16)
        note(tokens_per_s=len(batch.tokens) / seconds, prime_rl_tokens_per_s=PRIME_RL_TOKENS_PER_S)
        if learner._speed.peak is not None:
            mfu = operations / seconds / learner._speed.peak
            note.at_most("one_minus_mfu", 1 - mfu, 0.65)
            note(mfu=mfu)
            if mfu < 0.35:
                note(profile=_profile(learner, batch))
        _optimizers(place, note, learner)
    long = place.pick(32_768, 256)
    whole, cut = claim_of([long, long], vocab=vocab), claim_of([long // 32] * 64, vocab=vocab)
    with opened(place.settings(path, whole, **more | {"tokens_per_microbatch": long})) as learner:
        times = [fastest(2, learner.train, one) for one in (cut, whole)]
    note(attention_share_long=1 - times[0] / times[1], long_tokens=long)


def _profile(learner: Learner, batch: TrainBatch) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        learner.train(batch)
    return profiled.key_averages().table(sort_by="device_time_total", row_limit=20).splitlines()


def _optimizers(place: Place, note: Notes, learner: Learner) -> None:
    parameters = [parameter for parameter in learner._policy.parameters() if parameter.requires_grad]
    learner._optimizer.state.clear()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for name in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, **{name: True})
        optimizer.step()
        place.forget()
        before = 0 if place.cpu else torch.cuda.memory_allocated()
        note(**{f"adamw_{name}_s": fastest(3, optimizer.step)})
        if not place.cpu:
            note(**{f"adamw_{name}_peak_bytes": torch.cuda.max_memory_allocated() - before})


# 7


def publication(place: Place, note: Notes) -> None:
    """Seconds, resident peak and longest stall of publishing 4B: as it was before, and as it is."""
    path, vocab = place.model("4b"), place.shape("4b").vocab_size
    batch = claim_of([16, 16], vocab=vocab)
    with opened(place.settings(path, batch)) as learner:
        for threads in (1, place.pick(8, 1)):
            torch.set_num_threads(threads)
            note(**{f"cast_on_cpu_{threads}_threads_s": timed(_cast_on_cpu, learner)[0]})
        torch.set_num_threads(1)
        for turn in ("first", "second"):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with Ticker() as ticker:
                seconds, file = timed(learner.publish, lambda tensors, _: WeightsFile.write(tensors))
            assert file is not None
            size = os.fstat(file.descriptor).st_size
            note(**{f"published_{turn}_s": seconds, f"published_{turn}_stall_s": ticker.longest_s})
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            note(published_bytes=size, **{f"published_{turn}_resident_share": 1024 * grown / size})


def _cast_on_cpu(learner: Learner) -> None:
    for tensor in learner._policy.state_dict().values():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        whole.cpu().to(torch.bfloat16, copy=True)


class Ticker:
    """A thread that ticks each millisecond, and the longest time that it could not."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        last = time.perf_counter()
        while not self._ended.wait(0.001):
            now = time.perf_counter()
            self.longest_s, last = max(self.longest_s, now - last), now


# 8


def checkpoint(place: Place, note: Notes) -> None:
    """Saved beside training, loaded into a fresh process group bit for bit; a device given away and taken back; one
    step with states on the host."""
    path, vocab = place.model("0.6b"), place.shape("0.6b").vocab_size
    batch, folder = claim_of(place.pick([1024] * 8, [16] * 4), vocab=vocab), place.folder / "checkpoint"
    config = place.settings(path, batch, activation_checkpointing=True)
    with opened(config) as learner:
        learner.train(batch)
        saved = learner.weights()
        note(staged_s=timed(learner.save, str(folder))[0])
        started = time.perf_counter()
        losses = [learner.train(batch).metrics["learner/loss"]]
        learner.await_saved()
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        note(written_s=time.perf_counter() - started, bytes=size)
    with opened(config) as learner:
        note(loaded_s=timed(learner.load, str(folder))[0])
        loaded = learner.weights()
        assert saved is not None and loaded is not None
        note.true("bit_for_bit", all(torch.equal(saved[name], loaded[name]) for name in saved))
        note(offload_s=timed(learner.offload)[0])
        if not place.cpu:
            note(left_after_offload_bytes=torch.cuda.memory_reserved())
        note(restore_s=timed(learner.restore)[0])
        restored = learner.weights()
        assert restored is not None
        note.true("restored_bit_for_bit", all(torch.equal(saved[name], restored[name]) for name in saved))
        losses.append(learner.train(batch).metrics["learner/loss"])
    note.at_most("loss_trained_on_off", abs(losses[1] / losses[0] - 1), 0.05)
    for name, offload in (("on_the_gpu", False), ("cpu_offload", True)):
        with opened(place.settings(path, batch, cpu_offload=offload)) as learner:
            seconds, result = timed(learner.train, batch)
            note(**{f"{name}_s": seconds, f"{name}_grad_norm": result.metrics["learner/grad_norm"]})


# 9


def engine(place: Place, note: Notes) -> None:
    """The transformers engine beside the learner, a swap under load, its speed, and where it runs out of memory."""
    path, shape = place.model("0.6b"), place.shape("0.6b")
    length, slots = place.pick(256, 12), place.pick(128, 8)
    for number in (max(slots // 4, 1), slots):
        made = _engine(place, path, number)
        _generate(made, shape.vocab_size, number, length)
        seconds, answers = timed(_generate, made, shape.vocab_size, number, length)
        done = sum(len(tokens) for tokens, _ in answers.values())
        note(**{f"tokens_per_s_{number}_slots": done / seconds})
    batch = _claim_of_answers(answers, shape.vocab_size)
    with opened(place.settings(path, batch)) as learner:
        metrics = learner.train(batch).metrics
        note.at_most("mismatch_kl_size", abs(metrics["learner/mismatch_kl"]), 1e-3)
        note(mismatch_kl=metrics["learner/mismatch_kl"])
        published = learner.publish(lambda tensors, _: WeightsFile.write(tensors))
    assert published is not None
    for id in range(slots):
        made.add(_request(id, shape.vocab_size, length))
    for _ in range(4):
        made.step()
    started = time.perf_counter()
    made.load_weights(1, published, on_new_weights="keep_kv")
    note(swap_under_load_s=time.perf_counter() - started)
    note.true("generates_after_the_swap", len(made.step()) > 0 and made.version == 1)
    note(sleep_s=timed(made.sleep)[0])
    if not place.cpu:
        note(left_asleep_bytes=torch.cuda.memory_reserved())
    note(wake_s=timed(made.wake)[0])
    note.true("generates_after_waking", len(made.step()) > 0)
    if place.cpu:
        note(memory="skipped: a CPU has no memory to run out of")
        return
    numbers = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2 * slots
    capacity, cache = made._model._cache._capacity, made._model._cache
    free = torch.cuda.mem_get_info()[0]
    try:
        while True:
            cache._grow(capacity * 3 // 2)
            capacity = cache._capacity
    except torch.OutOfMemoryError:
        note(last_capacity=capacity, by_formula=free // numbers)


def _engine(place: Place, path: str, slots: int) -> TransformersEngine:
    place.forget()
    dtype = place.pick("bfloat16", "float32")
    return TransformersEngine(model_path=path, dtype=dtype, num_slots=slots, threads=1, seed=0)


def _request(id: int, vocab: int, length: int) -> Request:
    tokens = np.random.default_rng(id).integers(2, vocab, PROMPT).astype(np.int32)
    return Request(id=id, tokens=tokens, limit=length, remaining=length, temperature=1.0)


def _generate(
    made: TransformersEngine, vocab: int, number: int, length: int
) -> dict[int, tuple[list[int], list[float]]]:
    given: dict[int, tuple[list[int], list[float]]] = {id: ([], []) for id in range(number)}
    for id in given:
        made.add(_request(id, vocab, length))
    while made.active():
        for output in made.step():
            given[output.id][0].extend(output.tokens)
            given[output.id][1].extend(output.logprobs)
    return given


def _claim_of_answers(answers: dict[int, tuple[list[int], list[float]]], vocab: int) -> TrainBatch:
    batch = claim_of([PROMPT + len(tokens) for tokens, _ in answers.values()], vocab=vocab)
    for (id, (tokens, logprobs)), start in zip(answers.items(), batch.cu_seqlens[:-1], strict=True):
        first = start + PROMPT
        batch.tokens[start:first] = _request(id, vocab, 1).tokens
        batch.tokens[first : first + len(tokens)] = tokens
        batch.logprobs[first : first + len(tokens)] = logprobs
    return batch


# 10

CAPPED = """
import sys, time, torch
cuda = sys.argv[1] == "cuda"
if cuda:
    torch.cuda.set_per_process_memory_fraction(0.4)
size = int(0.3 * torch.cuda.mem_get_info()[1]) if cuda else 1 << 20
held = torch.zeros(size, dtype=torch.uint8, device=sys.argv[1])
while True:
    torch.ones(256, 256, device=sys.argv[1]).matmul(torch.ones(256, 256, device=sys.argv[1])).sum().item()
    print("works", flush=True)
    time.sleep(0.05)
"""


def two_processes(place: Place, note: Notes) -> None:
    """Two processes share the GPU, each with a cap: one goes on while the other is killed and starts again."""
    start = [sys.executable, "-c", CAPPED, place.device.type]
    running = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        note.true("both_work", all(_works(process) for process in running))
        running[0].kill()
        running[0].wait(timeout=30)
        note.true("the_second_goes_on", all(_works(running[1]) for _ in range(5)))
        running.append(subprocess.Popen(start, stdout=subprocess.PIPE, text=True))
        note.true("the_first_comes_back", _works(running[2]) and all(_works(running[1]) for _ in range(5)))
    finally:
        for process in running:
            process.kill()
            process.wait(timeout=30)


def _works(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline().strip() == "works"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One of the ten."""

    work: Callable[[Place, Notes], None]
    limit_s: float
    """About twice what it should take."""
    needs: tuple[str, ...] = ()
    """Attention arguments of torch without which it is skipped."""


ITEMS = {
    "attention": Item(work=attention, limit_s=90, needs=("window_size", "enable_gqa")),
    "scores": Item(work=scores, limit_s=120, needs=("window_size", "enable_gqa")),
    "steps": Item(work=steps, limit_s=240, needs=("window_size", "enable_gqa")),
    "noise": Item(work=noise, limit_s=120, needs=("window_size", "enable_gqa")),
    "memory": Item(work=memory, limit_s=180, needs=("window_size", "enable_gqa")),
    "speed": Item(work=speed, limit_s=120, needs=("window_size", "enable_gqa")),
    "publication": Item(work=publication, limit_s=200),
    "checkpoint": Item(work=checkpoint, limit_s=120, needs=("window_size", "enable_gqa")),
    "engine": Item(work=engine, limit_s=120, needs=("window_size", "enable_gqa")),
    "two_processes": Item(work=two_processes, limit_s=60),
}


def in_child(work: Callable[[Place, Notes], None], place: Place, sender: Connection) -> None:
    """Run an item, and send what it finds and how it ends."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        work(place, Notes(sender.send))
        sender.send({"status": "done"})
    except BaseException as error:  # whatever it is, the other items go on
        sender.send({"status": "failed", "error": f"{type(error).__name__}: {error}", "at": traceback.format_exc()})


def run_item(item: Item, place: Place, *, flush: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All that an item found; one that ends or hangs without a word has failed."""
    missing = [name for name in item.needs if not place.cpu and name not in inspect.signature(varlen_attn).parameters]
    if missing:
        return {"status": "skipped", "why": f"varlen_attn of torch {torch.__version__} has no {' and '.join(missing)}"}
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=in_child, args=(item.work, place, sender))
    found: dict[str, Any] = {"status": "failed", "error": "its process ended without a word", "missed": []}
    started = time.monotonic()
    child.start()
    sender.close()
    try:
        while receiver.poll(max(item.limit_s - (time.monotonic() - started), 0)):
            news = receiver.recv()
            found["missed"] += news.pop("missed", [])
            found |= news
            flush(found)
            if "status" in news:
                break
        else:
            found["error"] = f"it was not done after {item.limit_s:g} s"
    except EOFError:
        pass
    child.kill()
    child.join()
    if found["status"] == "done":
        del found["error"]
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Put the whole result in the place of the last one."""
    if path is None:
        return
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1, default=str) + "\n")
    aside.replace(path)


def device_of(sender: Connection) -> None:
    """Send the accelerator's name and memory; in a process of its own, for it makes a CUDA context."""
    found = torch.cuda.is_available()
    sender.send((torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]) if found else (platform.machine(), 0))


def main() -> int:
    """Run the items, and say how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", choices=[[], *ITEMS], help="all if none is named")
    parser.add_argument("--cpu", action="store_true", help="a dry run: tiny models on the CPU")
    parser.add_argument("--json", type=Path, help="write what is found here, as soon as it is")
    args = parser.parse_args()
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    asked = multiprocessing.get_context("fork").Process(target=device_of, args=(sender,))
    asked.start()
    name, size = receiver.recv() if receiver.poll(60) else ("unknown", 0)
    asked.join()
    if not size and not args.cpu:
        sys.stderr.write("there is no GPU here that torch can use; --cpu is the dry run\n")
        return 2
    result: dict[str, Any] = {
        "device": name, "bytes": size, "cpu": args.cpu, "torch": torch.__version__,
        "transformers": version("transformers"), "varlen_attn": str(inspect.signature(varlen_attn)), "items": {},
    }  # fmt: skip
    write(args.json, result)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(cpu=args.cpu, folder=Path(folder))
        for name in args.items or ITEMS:

            def flush(found: dict[str, Any], name: str = name) -> None:
                result["items"][name] = found
                write(args.json, result)

            found = run_item(ITEMS[name], place, flush=flush)
            flush(found)
            print(json.dumps({name: found}, default=str), flush=True)
    ended = [found for found in result["items"].values() if found["status"] == "failed" or found.get("missed")]
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(main())
