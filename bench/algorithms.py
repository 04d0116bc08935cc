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
from collections.abc import Iterable
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


def train(algorithm: str, number: int, *, seed: int, config: str, runs: Path, settings: list[str]) -> Run:
    """Train with one try of an algorithm, unless that run is finished already.

    Raises:
        RuntimeError: the run failed; its output is in the message.
    """
    name = f"{algorithm}-{number}-seed{seed}-{ITERATIONS}"
    own = TRIES[algorithm][number]
    if ITERATIONS not in _history(runs / name).evals:
        given = [f"run.name={name}", f"run.dir={runs}", f"run.iterations={ITERATIONS}", f"run.seed={seed}"]
        given += [f"eval.every={ITERATIONS}", f"learner.algorithm={algorithm}", *own]
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
        length=history.evals[ITERATIONS]["eval/length_mean"],
        seconds=sum(record["time/iteration_s"] for record in records),
    )


def _history(path: Path) -> History:
    history = History(path, max_spans=0)
    history.update()
    return history


def table(runs: list[Run]) -> str:
    """Final held-out reward, best first: mean and standard error over seeds, and what is missing to the best."""
    by_seed = {name: {run.seed: run for run in runs if run.algorithm == name} for name in _ranked(runs)}
    best = next(iter(by_seed.values()))
    lines = [
        "| algorithm | own settings | held-out first -> last | behind the best | train, last 5 | tokens | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in by_seed.items():
        found = list(seeds.values())
        behind = [best[seed].last - run.last for seed, run in seeds.items() if seed in best]
        lines.append(
            f"| {name} | {' '.join(found[0].settings) or '-'} | {np.mean([run.held_out[0] for run in found]):.3f} -> "
            f"{_mean([run.last for run in found])} | {_mean(behind) if seeds is not best else '-'} "
            f"| {_mean([float(np.mean(run.train[-5:])) for run in found])} "
            f"| {np.mean([run.length for run in found]):.0f} | {len(found)} |"
        )
    return "\n".join(lines)


def _ranked(runs: list[Run]) -> list[str]:
    names = dict.fromkeys(run.algorithm for run in runs)
    return sorted(names, key=lambda name: -float(np.mean([run.last for run in runs if run.algorithm == name])))


def _mean(values: list[float]) -> str:
    """The mean, and its standard error where there are several."""
    error = f" +- {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"


LEFT, RIGHT, TOP, BOTTOM = 50, 520, 40, 360
"""Of the left panel, in the plot's units."""


def plot(runs: list[Run]) -> str:
    """As SVG: training reward by iteration, mean and range over seeds; and the final held-out reward of each seed."""
    body = _axes()
    for index, name in enumerate(_ranked(runs)):
        found = [run for run in runs if run.algorithm == name]
        color = COLORS[list(TRIES).index(name)]
        smooth = np.array([np.convolve(run.train, np.ones(SMOOTHING) / SMOOTHING, "valid") for run in found])
        across = [_x(SMOOTHING + step) for step in range(smooth.shape[1])]
        outline = _points(across + across[::-1], [*smooth.max(0), *smooth.min(0)[::-1]])
        column, mean = RIGHT + 75 + 50 * index, _y(float(np.mean([run.last for run in found])))
        body += [
            f'<polygon points="{outline}" fill="{color}" opacity="0.12"/>',
            f'<polyline points="{_points(across, smooth.mean(0))}" fill="none" stroke="{color}" stroke-width="2"/>',
            *(f'<circle cx="{column}" cy="{_y(run.last):.1f}" r="4" fill="{color}"/>' for run in found),
            f'<line x1="{column - 14}" y1="{mean:.1f}" x2="{column + 14}" y2="{mean:.1f}" stroke="{color}"/>',
            f'<text transform="translate({column - 6},{BOTTOM + 14}) rotate(40)" fill="{color}">{escape(name)}</text>',
        ]
    style = 'font-family="sans-serif" font-size="13" fill="#222"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1020 450" {style}>'
    return "\n".join([head, '<rect width="1020" height="450" fill="white"/>', *body, "</svg>"])


def _axes() -> list[str]:
    rewards = np.linspace(0, 1, 6)
    iterations = range(SMOOTHING, ITERATIONS + 1, SMOOTHING)
    return [
        f'<text x="{LEFT}" y="25" font-weight="bold">training reward, mean of {SMOOTHING} iterations</text>',
        f'<text x="{RIGHT + 60}" y="25" font-weight="bold">held-out reward after {ITERATIONS} iterations</text>',
        *(f'<line x1="{LEFT}" y1="{_y(r):.1f}" x2="970" y2="{_y(r):.1f}" stroke="#ddd"/>' for r in rewards),
        *(f'<text x="{LEFT - 8}" y="{_y(r) + 4:.1f}" text-anchor="end">{r:.1f}</text>' for r in rewards),
        *(f'<text x="{_x(i):.1f}" y="{BOTTOM + 20}" text-anchor="middle">{i}</text>' for i in iterations),
    ]


def _x(iteration: float) -> float:
    return LEFT + (RIGHT - LEFT) * iteration / ITERATIONS


def _y(reward: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * reward


def _points(across: Iterable[float], rewards: Iterable[float]) -> str:
    return " ".join(f"{x:.1f},{_y(reward):.1f}" for x, reward in zip(across, rewards, strict=True))


def main() -> None:
    """Run what is missing, one after the other, and write table, JSON and plot after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/algorithms"), help="file names without ending")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {"config": options.config, "runs": options.runs, "settings": options.settings}
    scan: dict[str, list[Run]] = {}
    for algorithm, tries in TRIES.items():
        scan[algorithm] = [train(algorithm, number, seed=SCAN_SEED, **where) for number in range(len(tries))]
        print(algorithm, *(f"{' '.join(run.settings) or '-'} {run.last:.3f}" for run in scan[algorithm]), flush=True)
    runs: list[Run] = []
    for seed in SEEDS:
        for algorithm, found in scan.items():
            best = max(range(len(found)), key=lambda number: found[number].last)
            runs.append(train(algorithm, best, seed=seed, **where))
            results = {
                "settings": [*SETTINGS, *options.settings],
                "scan": [asdict(run) for part in scan.values() for run in part],
                "runs": [asdict(run) for run in runs],
            }
            options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            options.out.with_suffix(".svg").write_text(plot(runs))
            print(table(runs), flush=True)


if __name__ == "__main__":
    main()
