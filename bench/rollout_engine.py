"""Which engine generates the most tokens a second on this machine, with log-probs, for the same requests?

Ours against transformers' continuous batching (`ContinuousBatchingManager`, log-probs on) and against padded batches
of plain `generate` (with `output_logits`, from which the log-probs are taken). All three run in one process,
interleaved, with the same random weights (they rarely end a sequence early, so the lengths are those asked for),
prompts, maximum lengths, temperature and number of threads. Tokens are counted up
to the end of each sequence; the sampled lengths differ a little, so compare tokens/s. On a shared machine the tokens
per second of CPU time are the steadier number.

    uv run python bench/rollout_engine.py --json out.json

(On a CPU, transformers' continuous batching sizes its cache with psutil and sees 0 bytes without it.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.transformers.engine import TransformersEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One sequence to generate."""

    prompt: list[int]
    max_tokens: int


def make_cases(num: int, *, max_tokens: int, vocab_size: int, special: Sequence[int], seed: int) -> list[Case]:
    """Random prompts of 8 to 64 tokens with lognormal maximum lengths: many short ones, a few long ones."""
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    lengths = np.clip(np.round(rng.lognormal(np.log(max_tokens / 5), 0.9, num)), 4, max_tokens)
    return [
        Case(prompt=rng.choice(ordinary, rng.integers(8, 65)).tolist(), max_tokens=int(length)) for length in lengths
    ]


def run_ours(engine: TransformersEngine, cases: Sequence[Case]) -> int:
    """Generate all cases; returns the tokens."""
    waiting = deque(enumerate(cases))
    held = tokens = 0
    while waiting or held:
        while waiting and held < engine.num_slots:
            index, case = waiting.popleft()
            engine.add(
                Request(
                    id=index,
                    tokens=np.asarray(case.prompt, np.int32),
                    limit=case.max_tokens,
                    remaining=case.max_tokens,
                    temperature=1.0,
                )
            )
            held += 1
        outputs = engine.step()
        tokens += len(outputs)
        held -= sum(output.stop is not None for output in outputs)
    return tokens


def run_manager(model: Any, cases: Sequence[Case], *, slots: int) -> int:
    """Generate all cases with transformers' continuous batching; returns the tokens."""
    config = ContinuousBatchingConfig(
        return_logprobs=True,
        page_size=16,
        num_blocks=slots * 64,
        max_requests_per_batch=slots,
        max_batch_tokens=max(512, slots),
        auto_switch_to_flash=False,
        seed=0,
    )
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=model.generation_config.eos_token_id
    )
    tokens = 0
    with model.continuous_batching_context_manager(
        generation_config=sampling, continuous_batching_config=config, timeout=10
    ) as manager:
        for index, case in enumerate(cases):
            manager.add_request(case.prompt, request_id=str(index), max_new_tokens=case.max_tokens)
        deadline = time.monotonic() + 600
        for _ in cases:
            result = manager.get_result(timeout=max(0.0, deadline - time.monotonic()))
            if result is None or result.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed: {result and result.error}")
            assert len(result.logprobs) == len(result.generated_tokens)
            tokens += len(result.generated_tokens)
    return tokens


def run_generate(model: Any, cases: Sequence[Case], *, slots: int) -> int:
    """Generate all cases with `generate` in left-padded batches, each as long as its longest; returns the tokens."""
    tokens = 0
    eos = model.generation_config.eos_token_id
    for first in range(0, len(cases), slots):
        batch = cases[first : first + slots]
        width = max(len(case.prompt) for case in batch)
        pads = [width - len(case.prompt) for case in batch]
        output = model.generate(
            torch.tensor([[0] * pad + case.prompt for pad, case in zip(pads, batch, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
            max_new_tokens=max(case.max_tokens for case in batch),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[:, width:]
        logits = torch.stack(output.logits, dim=1)
        torch.log_softmax(logits.float(), dim=-1).gather(2, new[..., None])
        for row, case in zip(new.tolist(), batch, strict=True):
            row = row[: case.max_tokens]
            tokens += row.index(eos) + 1 if eos in row else len(row)
    return tokens


def measure(
    runs: dict[str, Callable[[Sequence[Case]], int]], cases: Sequence[Case], *, rounds: int
) -> list[dict[str, Any]]:
    """Warm each up with a few cases, then run all cases `rounds` times in turn."""
    for run in runs.values():
        run(cases[:32])
    walls: dict[str, list[float]] = {name: [] for name in runs}
    cpus: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[int]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens[name].append(run(cases))
            walls[name].append(tokens[name][-1] / (time.perf_counter() - wall))
            cpus[name].append(tokens[name][-1] / (time.process_time() - cpu))
    return [
        {
            "engine": name,
            "tokens_per_s_median": statistics.median(walls[name]),
            "tokens_per_s_min": min(walls[name]),
            "tokens_per_s_max": max(walls[name]),
            "tokens_per_cpu_s_median": statistics.median(cpus[name]),
            "tokens_mean": statistics.mean(tokens[name]),
        }
        for name in runs
    ]


def main() -> None:
    """Measure, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/tiny-arithmetic", help="folder whose architecture is measured")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.model), dtype=torch.float32)
        model.save_pretrained(folder)
        rows = compare(model.eval(), folder, arguments)
    if arguments.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "load_average": os.getloadavg()}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        settings = {k: v for k, v in vars(arguments).items() if k != "json"} | {"dtype": "float32", "temperature": 1.0}
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"settings": settings, "machine": machine, "versions": versions, "results": rows}, file, indent=2)


def compare(model: Any, folder: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all engines for each number of slots, printing as it goes."""
    cases = make_cases(
        arguments.requests,
        max_tokens=arguments.max_tokens,
        vocab_size=model.config.vocab_size,
        special=[0, model.generation_config.eos_token_id],
        seed=0,
    )
    rows = []
    for slots in arguments.slots:
        engine = TransformersEngine(
            model_path=folder,
            dtype="float32",
            num_slots=slots,
            threads=arguments.threads,
            seed=0,
            device="cpu",
        )
        runs: dict[str, Callable[[Sequence[Case]], int]] = {
            "pmdflow": partial(run_ours, engine),
            "transformers continuous": partial(run_manager, model, slots=slots),
            "transformers generate": partial(run_generate, model, slots=slots),
        }
        for row in measure(runs, cases, rounds=arguments.rounds):
            rows.append({"slots": slots} | row)
            print(
                f"slots {slots:4d}  {row['engine']:24s} {row['tokens_per_s_median']:8.0f} tokens/s "
                f"({row['tokens_per_s_min']:.0f} to {row['tokens_per_s_max']:.0f})  "
                f"{row['tokens_per_cpu_s_median']:8.0f} tokens/CPU s  {row['tokens_mean']:.0f} tokens",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()
