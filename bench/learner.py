"""How many tokens a second does one training step process, against a plain transformers `Trainer`-style step?

Ours is the learner's own `take_step` (packed rows, chunked log-probs, FSDP2, PMD loss, clipping, AdamW); the other pads
batches of `--rows` sequences in the order they come, calls the Hugging Face model with `labels` under autocast, clips
and steps with AdamW: what `Trainer` does with its default collator. Both have the same weights and data: sequences of
heavy-tailed lengths of which every token but the first is trained, and one optimizer step over all of them. Both run in
one process, interleaved, with as many threads. Tokens are those of the data, never padding.

    python bench/learner.py --json out.json                      # CPU, a model of about 20M parameters
    python bench/learner.py --size 0.5b --dtype bfloat16 \\
        --tokens-per-microbatch 8192 --longest 8192 --json out.json  # one GPU

MFU counts 6 FLOP a parameter and token (embeddings that are only looked up left out) and the causal half of attention.
The reference pass (log pi_i of the claim, once an iteration) has no counterpart in a supervised step: timed by itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pmdflow.config.schema import Config
from pmdflow.learner.actor import Learner
from pmdflow.learner.batch import plan_iteration
from pmdflow.learner.steps import Sums, reference_pass
from pmdflow.types import Mask, TrainBatch

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 316,
    },
    "20m": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32_000,
    },
    "0.5b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
    },
}  # fmt: skip
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s from the vendors' data sheets, without sparsity."""


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
                "steps_per_iteration": 1,
                "tokens_per_microbatch": args.tokens_per_microbatch,
                "threads": args.threads,
                "lr": 1e-5,
                "packing": not args.padded,
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
        trained = (batch.mask & Mask.TRAINED) != 0
        settings = config.learner
        (self.plan,) = plan_iteration(
            batch,
            trained=trained,
            steps=1,
            ranks=1,
            tokens_per_microbatch=settings.tokens_per_microbatch,
            packing=settings.packing,
        )
        self.micros = self.learner._load(batch, self.plan, trained, self.learner._advantages(batch))
        self.anchors = [micro.behavior for micro in self.micros]

    def step(self) -> None:
        """One optimizer step."""
        self.learner._step(self.plan, self.micros, self.anchors, Sums(), "the benchmark")

    def reference(self) -> None:
        """The no-grad pass over the batch."""
        reference_pass(self.learner._policy, self.micros)


class Plain:
    """A `Trainer`-style step: padded rows, the model's own loss over `labels`, autocast, AdamW."""

    def __init__(self, args: argparse.Namespace, model: str, batch: TrainBatch, device: torch.device) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        if args.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
        rows = torch.from_numpy(batch.tokens.astype(np.int64)).split(np.diff(batch.cu_seqlens).tolist())
        if args.group_by_length:
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


def step_flops(config: Any, batch: TrainBatch) -> float:
    """FLOP of one forward and backward pass: matrix products, and the causal half of attention."""
    per_layer = (
        config.hidden_size * config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
        + 3 * config.hidden_size * config.intermediate_size
    )
    weights = config.num_hidden_layers * per_layer + config.hidden_size * config.vocab_size
    lengths = np.diff(batch.cu_seqlens).astype(float)
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * (lengths**2).sum()
    return float(6 * weights * lengths.sum() + attention)


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


def run(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Interleave both for `--repeats` rounds after one to warm up."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    settings = Qwen3Config(**SIZES[args.size], max_position_embeddings=args.longest, tie_word_embeddings=True)
    initial = Qwen3ForCausalLM(settings)
    num_parameters = sum(parameter.numel() for parameter in initial.parameters())
    initial.save_pretrained(model)
    del initial
    batch = make_batch(args, settings.vocab_size)
    ours = Ours(make_config(args, model, batch), batch)
    device = ours.learner._device
    plain = Plain(args, model, batch, device)
    works = {"ours": ours.step, "plain": plain.step, "reference": ours.reference}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(args.repeats + 1):
        for name, work in works.items():
            took = timed(work)
            if turn:
                seconds[name].append(took)
    tokens = len(batch.tokens)
    results = {name: summarize(taken, tokens) for name, taken in seconds.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
    flops = step_flops(settings, batch)
    if peak is not None:
        for part in ("ours", "plain"):
            results[part]["mfu"] = flops / results[part]["step_s_median"] / peak
    ratios = [other[0] / own[0] for own, other in zip(seconds["ours"], seconds["plain"], strict=True)]
    padded = sum(int(part["input_ids"].numel()) for part in plain.batches)
    return {
        "device": name,
        "threads": args.threads,
        "dtype": args.dtype,
        "num_parameters": num_parameters,
        "tokens": tokens,
        "sequences": args.sequences,
        "longest": int(np.diff(batch.cu_seqlens).max()),
        "plain_padded_tokens": padded,
        "our_microbatches": len(ours.micros),
        "step_flop": flops,
        "ratio": results["ours"]["tokens_per_s"] / results["plain"]["tokens_per_s"],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "cpu_ratio": results["ours"]["tokens_per_cpu_s"] / results["plain"]["tokens_per_cpu_s"],
        **results,
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="20m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest sequence")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a padded batch of the plain step")
    parser.add_argument("--group-by-length", action="store_true", help="the plain step sorts its sequences first")
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--padded", action="store_true", help="ours with learner.packing false")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--activation-checkpointing", action="store_true", help="both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as model:
        result = run(args, model)
    print(
        f"{result['num_parameters'] / 1e6:.1f}M parameters, {result['tokens']} tokens in {args.sequences} sequences "
        f"(padded {result['plain_padded_tokens']}), {args.dtype}, {result['device']}, {args.threads} threads"
    )
    for part in ("ours", "plain", "reference"):
        values = result[part]
        mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
        print(
            f"{part:>9}: {values['tokens_per_s']:8.0f} tokens/s, step {values['step_s_median']:.3f} s "
            f"({values['step_s_min']:.3f} to {values['step_s_max']:.3f}), {values['cpu_s_median']:.3f} CPU s{mfu}"
        )
    print(
        f"ratio ours / plain {result['ratio']:.2f} ({result['ratio_min']:.2f} to {result['ratio_max']:.2f}), "
        f"by CPU time {result['cpu_ratio']:.2f}"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
