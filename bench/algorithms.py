"""Which algorithm learns best on the tiny model? Real runs by `pmdflow up`; a table, JSON and one plot.

    nice python bench/algorithms.py --runs DIRECTORY --out bench/results/algorithms

Each algorithm first gets three tries with one seed: the quick start's learning rate, twice that, and another value of
its own setting (`TRIES`). The try with the highest held-out reward then runs with fresh seeds; all algorithms see the
same prompts under one seed. `scheduler.lookahead=0` alternates rollout and training, so what a run learns does not
depend on how fast or how busy the machine is. The peers of PMD are GRPO, GSPO, CTPO and BOLT. Runs that are finished in
`--runs` are read, not repeated. More settings follow as KEY=VALUE.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pmdflow.metrics.history import History

SETTINGS = (
    "scheduler.lookahead=0",
    "eval.prompts=256",
    "learner.checkpoint_every=1000",
    "dashboard.port=null",
)
TWICE = ("learner.lr=1.0e-4",)
STRONG, WEAK = ("learner.tau=0.5",), ("learner.tau=0.1",)
TRIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "pmd_mean": (WEAK, WEAK + TWICE, STRONG),
    # At a small tau the baseline is nearly the best reward of the others: right answers get an advantage of about 0
    # and wrong ones of about -1, and a policy that only unlearns falls apart.
    "pmd_partition": (STRONG, STRONG + TWICE, WEAK),
    "boltzmann_pmd": (STRONG, STRONG + TWICE, WEAK),
    "weighted_sft": (STRONG, STRONG + TWICE, WEAK),
    "token_pmd": (WEAK, WEAK + TWICE, STRONG),
    "ctpo": ((), TWICE, ("learner.clip_low=0.4", "learner.clip_high=0.4")),
    "grpo": ((), TWICE, ("learner.clip_high=0.28",)),
    # The second band suits answers of tens of tokens: the paper's is for thousands.
    "gspo": ((), TWICE, ("learner.clip_low=0.03", "learner.clip_high=0.04")),
}
SCAN_SEED, SEEDS = 0, (1, 2, 3)
ITERATIONS = 15
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
RUN_TIMEOUT_S = 1800.0
SMOOTHING = 3
"""Iterations in the moving mean of the training reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run showed."""

    algorithm: str
    settings: tuple[str, ...]
    seed: int
    train: list[float]
    """Mean reward of each iteration's claim."""
    held_out: dict[int, float]
    """Mean reward of the held-out prompts, by the iteration after which they were begun."""
    length: float
    """Mean tokens of the last held-out answers."""
    seconds: float
    """Wall-clock of the iterations."""

    @property
    def last(self) -> float:
        """Held-out reward of the final policy."""
        return self.held_out[max(self.held_out)]


def train(
    algorithm: str, number: int, *, seed: int, iterations: int, config: str, runs: Path, settings: list[str]
) -> Run:
    """Train with one try of an algorithm, unless that run is finished already.

    Raises:
        RuntimeError: the run failed; its output is in the message.
    """
    name = f"{algorithm}-{number}-seed{seed}-{iterations}"
    own = TRIES[algorithm][number]
    if iterations not in _history(runs / name).evals:
        given = [f"run.name={name}", f"run.dir={runs}", f"run.iterations={iterations}", f"run.seed={seed}"]
        given += [f"eval.every={iterations}", f"learner.algorithm={algorithm}", *own]
        shutil.rmtree(runs / name, ignore_errors=True)  # of a run that was cut short
        command = [sys.executable, "-m", "pmdflow.cli", "up", config, *SETTINGS, *settings, *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    history = _history(runs / name)
    records = [history.iterations[number] for number in sorted(history.iterations)]
    return Run(
        algorithm=algorithm,
        settings=own,
        seed=seed,
        train=[record["reward/mean"] for record in records],
        held_out={number: record["eval/reward_mean"] for number, record in sorted(history.evals.items())},
        length=history.evals[iterations]["eval/length_mean"],
        seconds=sum(record["time/iteration_s"] for record in records),
    )


def _history(path: Path) -> History:
    history = History(path, max_spans=0)
    history.update()
    return history


def main() -> None:
    """Run what is missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/algorithms"), help="file names without ending")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {"config": options.config, "runs": options.runs, "settings": options.settings}
    best: dict[str, int] = {}
    scan: list[Run] = []
    for algorithm, tries in TRIES.items():
        found = [
            train(algorithm, number, seed=SCAN_SEED, iterations=ITERATIONS, **where) for number in range(len(tries))
        ]
        best[algorithm] = max(range(len(tries)), key=lambda number: found[number].last)
        scan += found
        print(algorithm, [round(run.last, 3) for run in found], flush=True)
    for seed in SEEDS:
        for algorithm, number in best.items():
            run = train(algorithm, number, seed=seed, iterations=ITERATIONS, **where)
            print(algorithm, seed, run.held_out, flush=True)


if __name__ == "__main__":
    main()
