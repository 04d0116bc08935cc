"""What a draw by success costs, and whether it saves tokens.

    python bench/prompt_sampling.py cost [--rounds 5]
    python bench/prompt_sampling.py run --runs DIRECTORY [--seeds 5]

`cost` times a draw at 1,000 and 1,000,000 prompts, and what a claim of 128 groups moves.

`run` first teaches the tiny model chains of few numbers (`SOLVED`), exports it, and goes on from there with a file of
`NUM_SOLVED` of these and `NUM_HARD` long ones that it still fails (`HARD`), drawn in epochs and drawn by failure
(`data.curriculum`) in turn, seed by seed. Compared are the generated training tokens until the held-out reward, on
another 128 of the same mixture, first reaches `TARGET`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import time
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import yaml

from pmdflow.config.sources import CurriculumConfig
from pmdflow.data.curriculum import Curriculum
from pmdflow.data.gym import make_dataset, pack
from pmdflow.data.mixture import Schedule
from pmdflow.metrics.history import History
from pmdflow.store.answers import Successes

ROOT = Path(__file__).resolve().parents[1]
SOLVED = ("chain_sum", {"min_terms": 3, "max_terms": 6, "min_digits": 1, "max_digits": 1})
HARD = (
    "decimal_chain_sum",
    {"min_terms": 7, "max_terms": 32, "min_digits": 1, "max_digits": 1}
    | {"min_decimal_places": 0, "max_decimal_places": 0},
)
NUM_SOLVED, NUM_HARD, HELD_OUT = 480, 160, 128
TARGET = 0.9
WARM_ITERATIONS, ITERATIONS = 12, 30


class Rows:
    """A finite source of as many prompts."""

    name = "rows"

    def __init__(self, num_train: int) -> None:
        """Of nothing but numbers."""
        self.num_train = num_train

    def row(self, number: int) -> int:
        """As they come."""
        return number % self.num_train


def cost(rounds: int) -> None:
    """Print microseconds of a draw, and milliseconds of an update."""
    for size in (1_000, 1_000_000):
        rng = np.random.default_rng(0)
        source: Any = Rows(size)
        curriculum = Curriculum(
            CurriculumConfig(), sources=[source], weights=[1.0], schedule=Schedule([1.0], seed=0), seed=0
        )
        draws, updates = [], []
        for number in range(1, rounds + 1):
            keys = rng.choice(size, size=min(128, size), replace=False).astype(np.uint64)
            moved = Successes(number=number, keys=keys, rates=rng.random(len(keys)))
            start = time.perf_counter()
            curriculum.learn(moved)
            updates.append(time.perf_counter() - start)
            start = time.perf_counter()
            for cursor in range(10_000):
                curriculum.draw(cursor)
            draws.append((time.perf_counter() - start) / 10_000)
        print(
            f"{size:>9,} prompts: a draw {median(draws) * 1e6:.1f} us ({min(draws) * 1e6:.1f} to "
            f"{max(draws) * 1e6:.1f}), an update {median(updates) * 1e3:.2f} ms"
        )


def rows_of(kind: tuple[str, dict[str, Any]], count: int, *, seed: int) -> list[dict[str, Any]]:
    """As many different prompts with what the reward function needs."""
    name, args = kind
    found: dict[str, dict[str, Any]] = {}
    dataset = make_dataset(name=name, args={"size": 4 * count, **args}, seed=seed)
    for index in range(4 * count):
        entry = dataset[index]
        asked = {"dataset": name, "args": args, "question": entry["question"], "answer": entry["answer"]}
        found.setdefault(entry["question"], {"prompt": entry["question"], **asked, "metadata": pack(entry["metadata"])})
    return list(found.values())[:count]


def write_mixture(path: Path) -> None:
    """Both kinds, shuffled; the end of the file, which is held out, is the same mixture."""
    solved = rows_of(SOLVED, NUM_SOLVED + HELD_OUT * 3 // 4, seed=1)
    hard = rows_of(HARD, NUM_HARD + HELD_OUT // 4, seed=2)
    train, held_out = solved[:NUM_SOLVED] + hard[:NUM_HARD], solved[NUM_SOLVED:] + hard[NUM_HARD:]
    for part in (train, held_out):
        random.Random(0).shuffle(part)
    path.write_text("".join(json.dumps(row) + "\n" for row in train + held_out))


def up(config: dict[str, Any], runs: Path, name: str) -> Path:
    """A run to its end; a finished one is not repeated."""
    config["run"] |= {"name": name, "dir": str(runs)}
    path = runs / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    _pmdflow("up", str(path), "dashboard.port=null")
    return runs / name


def _pmdflow(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    command = ["uv", "run", "pmdflow", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def tokens_to(run: Path, target: float) -> tuple[int | None, list[float]]:
    """Generated training tokens when the held-out reward first reached `target`, and all rewards."""
    history = History(run)
    history.update()
    rewards = [history.evals[number]["eval/reward_mean"] for number in sorted(history.evals)]
    for number in sorted(history.evals):
        if history.evals[number]["eval/reward_mean"] >= target:
            return (history.iterations[number]["ledger/generated"] if number else 0), rewards
    return None, rewards


def run(runs: Path, seeds: int) -> None:
    """Both orders in turn, seed by seed."""
    runs.mkdir(parents=True, exist_ok=True)
    base: dict[str, Any] = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    base["model"]["path"] = str(ROOT / "configs/tiny-arithmetic")
    model = runs / "base"
    if not model.is_dir():
        warm = base | {"run": {"iterations": WARM_ITERATIONS, "seed": 1000}}
        warm["data"] = base["data"] | {"task": f"reasoning_gym/{SOLVED[0]}", "args": SOLVED[1]}
        _pmdflow("export", str(up(warm, runs, "warm")), str(model))
    data = runs / "mixture.jsonl"
    write_mixture(data)
    ratios = []
    for seed in range(seeds):
        tokens: dict[str, int | None] = {}
        for name, curriculum in (("epochs", None), ("failure", {"priority": "failure"})):
            config = base | {
                "run": {"iterations": ITERATIONS, "seed": seed},
                "model": {"path": str(model)},
                "eval": {"prompts": HELD_OUT, "every": 1},
                "data": {
                    "task": str(data),
                    "group_size": base["data"]["group_size"],
                    "max_tokens": base["data"]["max_tokens"],
                    "curriculum": curriculum,
                },
            }
            tokens[name], rewards = tokens_to(up(config, runs, f"{name}-{seed}"), TARGET)
            print(f"seed {seed} {name:<8} {tokens[name]} tokens to {TARGET}; {' '.join(f'{r:.2f}' for r in rewards)}")
        if tokens["epochs"] and tokens["failure"]:
            ratios.append(tokens["failure"] / tokens["epochs"])
    spread = f" +- {stdev(ratios):.2f}" if len(ratios) > 1 else ""
    print(f"tokens by failure / in epochs: {fmean(ratios):.2f}{spread} of {len(ratios)} pairs: {ratios}")


def main() -> None:
    """Time draws, or make runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cost").add_argument("--rounds", type=int, default=5)
    make = commands.add_parser("run")
    make.add_argument("--runs", type=Path, required=True)
    make.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if options.command == "cost":
        cost(options.rounds)
    else:
        run(options.runs.absolute(), options.seeds)


if __name__ == "__main__":
    main()
