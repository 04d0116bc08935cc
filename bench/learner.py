"""How many tokens a second does one training step process, against a plain transformers `Trainer`-style step?

Ours is the learner's own step (packed rows, chunked log-probs, FSDP2, PMD loss, clipping, AdamW). The others call the
Hugging Face model with `labels` under autocast on padded batches of `--rows` sequences, clip and step with AdamW, as
`Trainer` does: `padded` takes sequences in the order they come, `sorted` by length (`group_by_length`). All have the
same weights and data: sequences of heavy-tailed lengths of which every token but the first is trained, and one
optimizer step over all of them. They run in one process, interleaved, with as many threads. Tokens are those of the
data, never padding.

    nice python bench/learner.py --json out.json               # CPU, a model of about 20M parameters
    python bench/learner.py --size 0.5b --json out.json        # one GPU: bfloat16, micro-batches of 8,192 tokens

MFU counts 6 FLOP a parameter and token (embeddings that are only looked up left out) and the causal half of attention.
The reference pass (log pi_i of the claim, once an iteration) has no counterpart in a supervised step: timed by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pmdflow.config.schema import Config
from pmdflow.learner.learner import Learner
from pmdflow.learner.preparation import load_steps, plan_claim
from pmdflow.learner.steps import reference_pass
from pmdflow.learner.sums import Sums
from pmdflow.types import Claim, Mask, TrainBatch

PEERS = ("padded", "sorted")
SIZES: dict[str, dict[str, Any]] = {
    "20m": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32_000,
    },
    "0.5b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
    },
}  # fmt: skip
DATA: dict[str, dict[str, Any]] = {
    "20m": {"dtype": "float32", "sequences": 32, "longest": 1024, "microbatch": 2048, "rows": 8},
    "0.5b": {"dtype": "bfloat16", "sequences": 64, "longest": 8192, "microbatch": 8192, "rows": 4},
}
"""Compute type; sequences, tokens of the longest; tokens of our micro-batches; rows of a padded batch."""


def make_batch(args: argparse.Namespace, vocab_size: int) -> TrainBatch:
    """Sequences of lognormal lengths, two a group, one token of prompt each."""
    rng = np.random.default_rng(args.seed)
    lengths = np.clip(np.round(rng.lognormal(np.log(args.longest / 8), 1.0, args.sequences)), 16, args.longest)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(cu_seqlens[-1])
    mask = np.full(total, Mask.GENERATED | Mask.TRAINED, np.uint8)
    mask[cu_seqlens[:-1]] = 0
    return TrainBatch(
        iteration=1,
        version=0,
        tokens=rng.integers(2, vocab_size, total).astype(np.int32),
        logprobs=np.full(total, -np.log(vocab_size), np.float32),
        versions=np.zeros(total, np.int32),
        temperatures=np.ones(total, np.float32),
        mask=mask,
        cu_seqlens=cu_seqlens,
        prompt_lengths=np.ones(args.sequences, np.int32),
        groups=np.arange(args.sequences) // 2,
        trajectories=np.arange(args.sequences),
        rewards=rng.integers(0, 2, args.sequences).astype(np.float64),
        components={},
        stops=np.ones(args.sequences, np.uint8),
        prompt_ids=("p",) * args.sequences,
    )


def make_config(args: argparse.Namespace, model: str, batch: TrainBatch) -> Config:
    """The learner's settings: one optimizer step over the whole batch."""
    return Config.model_validate(
        {
            "run": {"name": "bench", "iterations": 1},
            "model": {"path": model, "dtype": args.dtype},
            "data": {"task": "reasoning_gym/chain_sum", "group_size": 2, "max_tokens": args.longest - 1},
            "reward": {"functions": [{"function": "a:b"}]},
            "scheduler": {"groups_per_iteration": args.sequences // 2, "tokens_per_iteration": len(batch.tokens)},
            "learner": {
                "ranks": 1,
                "steps_per_iteration": 1,
                "tokens_per_microbatch": args.microbatch,
                "threads": args.threads,
                "lr": 1e-5,
                "anchor": "behavior",
                "compile": args.compile,
                "activation_checkpointing": args.activation_checkpointing,
            },
            "store": {"max_bytes": "1024GiB"},
        }
    )


class Ours:
    """The learner's step, without its reference pass."""

    def __init__(self, config: Config, batch: TrainBatch) -> None:
        self.learner = Learner(config=config, rank=0)
        self.learner.setup(self.learner.address())
        torch.use_deterministic_algorithms(False)
        claim, ones = Claim.of(batch), np.ones(len(batch.rewards))
        counts, quadratic = claim.count(Mask.TRAINED), self.learner._speed.quadratic
        (self.plan,) = plan_claim(config.learner, claim, counts, steps=1, quadratic=quadratic)
        (micros,) = load_steps(
            config.learner, claim, batch.read, [self.plan], ones, rank=0, device=self.learner._device
        )
        rewards = torch.from_numpy(batch.rewards).to(self.learner._device)
        self.micros = [replace(micro, sequence_credit=rewards[micro.trajectories]) for micro in micros]
        self.anchors = [micro.behavior for micro in self.micros]

    def step(self) -> None:
        """One optimizer step."""
        self.learner._step(self.plan, self.micros, self.anchors, Sums(max_grad_norm=1.0), "the benchmark")

    def reference(self) -> None:
        """The no-grad pass over the batch."""
        reference_pass(self.learner._policy, self.micros)


class Plain:
    """A `Trainer`-style step: padded rows, the model's own loss over `labels`, autocast, AdamW."""

    def __init__(
        self, args: argparse.Namespace, model: str, batch: TrainBatch, device: torch.device, *, by_length: bool
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        if args.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
        rows = torch.from_numpy(batch.tokens.astype(np.int64)).split(np.diff(batch.cu_seqlens).tolist())
        if by_length:
            rows = tuple(sorted(rows, key=len, reverse=True))
        starts = range(0, len(rows), args.rows)
        self.batches = [self._collate(rows[start : start + args.rows], device) for start in starts]
        self.num_tokens = int(np.diff(batch.cu_seqlens).sum()) - len(rows)

    def _collate(self, rows: tuple[Tensor, ...], device: torch.device) -> dict[str, Tensor]:
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        labels = tokens.masked_fill(~mask, -100)
        return {
            name: value.to(device)
            for name, value in (("input_ids", tokens), ("attention_mask", mask.long()), ("labels", labels))
        }

    def step(self) -> None:
        """One optimizer step over all batches, with `Trainer`'s count of tokens over the accumulated batches."""
        for batch in self.batches:
            with self.autocast:
                loss = self.model(**batch, num_items_in_batch=self.num_tokens, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def summarize(seconds: list[tuple[float, float]], tokens: int) -> dict[str, Any]:
    """Median and spread; on a shared machine the CPU seconds are the steadier ones."""
    wall, cpu = zip(*seconds, strict=True)
    return {
        "step_s_median": statistics.median(wall),
        "step_s_min": min(wall),
        "step_s_max": max(wall),
        "cpu_s_median": statistics.median(cpu),
        "tokens_per_s": tokens / statistics.median(wall),
        "tokens_per_cpu_s": tokens / statistics.median(cpu),
        "step_s": list(wall),
    }


def compare(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Interleave all for `--repeats` rounds after one to warm up."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    settings = Qwen3Config(**SIZES[args.size], max_position_embeddings=args.longest, tie_word_embeddings=True)
    initial = Qwen3ForCausalLM(settings)
    num_parameters = sum(parameter.numel() for parameter in initial.parameters())
    initial.save_pretrained(model)
    del initial
    batch = make_batch(args, settings.vocab_size)
    ours = Ours(make_config(args, model, batch), batch)
    device, speed = ours.learner._device, ours.learner._speed
    peers = {name: Plain(args, model, batch, device, by_length=name == "sorted") for name in PEERS}
    works = {"ours": ours.step, "reference": ours.reference, **{name: peer.step for name, peer in peers.items()}}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(args.repeats + 1):
        for name, work in works.items():
            took = timed(work)
            if turn:
                seconds[name].append(took)
    tokens, lengths = len(batch.tokens), np.diff(batch.cu_seqlens)
    results = {name: summarize(taken, tokens) for name, taken in seconds.items()}
    flops = speed.operations(lengths)
    if speed.peak is not None:
        for name in ("ours", *PEERS):
            results[name]["mfu"] = flops / results[name]["step_s_median"] / speed.peak
    for name, peer in peers.items():
        results[name]["padded_tokens"] = sum(int(part["input_ids"].numel()) for part in peer.batches)
        for clock, part in (("wall", 0), ("cpu", 1)):
            ratios = [other[part] / own[part] for own, other in zip(seconds["ours"], seconds[name], strict=True)]
            results[name][f"ratio_{clock}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        **vars(args),
        "json": None,
        "num_parameters": num_parameters,
        "tokens": tokens,
        "longest": int(lengths.max()),
        "our_microbatches": len(ours.micros),
        "step_flop": flops,
        **results,
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="20m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--longest", type=int, help="tokens of the longest sequence")
    parser.add_argument("--rows", type=int, help="sequences of a padded batch of the plain steps")
    parser.add_argument("--microbatch", type=int, help="tokens of our micro-batches")
    parser.add_argument("--compile", action="store_true", help="ours")
    parser.add_argument("--activation-checkpointing", action="store_true", help="all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    for name, value in DATA[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with tempfile.TemporaryDirectory() as model:
        result = compare(args, model)
    print(
        f"{result['num_parameters'] / 1e6:.1f}M parameters, {result['tokens']} tokens in {args.sequences} sequences, "
        f"{args.dtype}, {result['device']}, {args.threads} threads, load {result['load']:.1f}"
    )
    for name in ("ours", "reference", *PEERS):
        values = result[name]
        mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
        padded = f", padded to {values['padded_tokens']}" if name in PEERS else ""
        print(
            f"{name:>9}: {values['tokens_per_s']:8.0f} tokens/s, step {values['step_s_median']:.3f} s "
            f"({values['step_s_min']:.3f} to {values['step_s_max']:.3f}), "
            f"{values['cpu_s_median']:.3f} CPU s{mfu}{padded}"
        )
    for name in PEERS:
        wall, cpu = ("{:.2f} ({:.2f} to {:.2f})".format(*result[name][f"ratio_{clock}"]) for clock in ("wall", "cpu"))
        print(f"ours / {name}: {wall} times its tokens/s, by CPU time {cpu}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
