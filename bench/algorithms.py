"""Which algorithm learns best on the tiny model? One short real run each, by `pmdflow up`; a table, JSON and one plot.

    python bench/algorithms.py --out bench/results/algorithms

All runs share seed, prompts, budgets and learning rate, and but for `OWN_SETTINGS` everything else; the peers of PMD
are GRPO, GSPO, CTPO and BOLT. Runs that are finished in `--runs` are read, not repeated. More settings follow as
KEY=VALUE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np

from pmdflow.config.combinations import ALGORITHM_NAMES
from pmdflow.metrics.history import History

SETTINGS = (
    "data.group_size=8",
    "scheduler.groups_per_iteration=8",
    "eval.every=4",
    "dashboard.port=null",
)
OWN_SETTINGS = {"pmd_partition": ("learner.tau=0.5",)}
"""At the default tau of 0.05 the partition baseline is nearly the best reward of the others: right answers get an
advantage of about 0 and wrong ones of about -1, and a policy that only unlearns falls apart (0.37 to 0.01 here)."""
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
RUN_TIMEOUT_S = 1200.0
SMOOTHING = 3
"""Iterations in the moving mean of the training reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What one run showed."""

    algorithm: str
    train: list[float]
    """Mean reward of each iteration's claim."""
    held_out: dict[int, float]
    """Mean reward of the held-out prompts, by the iteration after which they were begun."""
    prompts: int
    seconds: float
    """Wall-clock of the iterations."""


def run(algorithm: str, *, config: str, runs: Path, iterations: int, settings: list[str]) -> Curve:
    """Train with one algorithm, unless that run is finished already.

    Raises:
        RuntimeError: the run failed; its output is in the message.
    """
    name = f"algorithm-{algorithm}"
    if len(_history(runs / name).iterations) < iterations:
        own = [f"run.name={name}", f"run.dir={runs}", f"run.iterations={iterations}", f"learner.algorithm={algorithm}"]
        own += OWN_SETTINGS.get(algorithm, ())
        command = [sys.executable, "-m", "pmdflow.cli", "up", config, *SETTINGS, *settings, *own]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    history = _history(runs / name)
    records = [history.iterations[number] for number in sorted(history.iterations)]
    return Curve(
        algorithm=algorithm,
        train=[record["reward/mean"] for record in records],
        held_out={number: record["eval/reward_mean"] for number, record in sorted(history.evals.items())},
        prompts=max(record["eval/prompts"] for record in history.evals.values()),
        seconds=sum(record["time/iteration_s"] for record in records),
    )


def _history(path: Path) -> History:
    history = History(path, max_spans=0)
    history.update()
    return history


def table(curves: list[Curve]) -> str:
    """Held-out reward first and last, best first, with the standard error of the difference."""
    lines = [
        "| algorithm | held-out first -> last | change | train, first 3 -> last 3 | seconds |",
        "|---|---|---|---|---|",
    ]
    for curve in sorted(curves, key=lambda curve: -_last(curve)):
        first, last = curve.held_out[min(curve.held_out)], _last(curve)
        error = np.sqrt((first * (1 - first) + last * (1 - last)) / curve.prompts)
        early, late = np.mean(curve.train[:3]), np.mean(curve.train[-3:])
        lines.append(
            f"| {curve.algorithm} | {first:.3f} -> {last:.3f} | {last - first:+.3f} +- {error:.3f} "
            f"| {early:.3f} -> {late:.3f} | {curve.seconds:.0f} |"
        )
    return "\n".join(lines)


def _last(curve: Curve) -> float:
    return curve.held_out[max(curve.held_out)]


def plot(curves: list[Curve]) -> str:
    """Two panels as SVG: held-out reward, and the moving mean of the training reward, by iteration."""
    kernel = np.ones(SMOOTHING) / SMOOTHING
    held_out = [list(curve.held_out.items()) for curve in curves]
    train = [
        list(zip(range(SMOOTHING, len(curve.train) + 1), np.convolve(curve.train, kernel, "valid"), strict=True))
        for curve in curves
    ]
    body = [*_panel(held_out, x=50, title="held-out reward"), *_panel(train, x=460, title="training reward, mean of 3")]
    for index, curve in enumerate(curves):
        color, y = COLORS[index % len(COLORS)], 50 + 22 * index
        body.append(f'<line x1="830" y1="{y}" x2="855" y2="{y}" stroke="{color}" stroke-width="3"/>')
        body.append(f'<text x="862" y="{y + 4}">{escape(curve.algorithm)}</text>')
    style = 'font-family="sans-serif" font-size="13" fill="#222"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 340" {style}>'
    return "\n".join([head, '<rect width="980" height="340" fill="white"/>', *body, "</svg>"])


def _panel(lines: list[list[tuple[int, float]]], *, x: int, title: str) -> list[str]:
    """One set of axes, 330 x 250, with a line and dots for each list of (iteration, reward)."""
    end = max(iteration for line in lines for iteration, _ in line)
    rewards = [reward for line in lines for _, reward in line]
    low, high = np.floor(min(rewards) * 10) / 10, np.ceil(max(rewards) * 10) / 10

    def place(iteration: float, reward: float) -> tuple[float, float]:
        return x + 330 * iteration / end, 290 - 250 * (reward - low) / (high - low)

    parts = [f'<text x="{x}" y="25" font-weight="bold">{title}</text>']
    for reward in np.linspace(low, high, 6):
        y = place(0, reward)[1]
        parts.append(f'<line x1="{x}" y1="{y:.1f}" x2="{x + 330}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{reward:.2f}</text>')
    for iteration in range(0, end + 1, max(1, end // 6)):
        left = place(iteration, low)[0]
        parts.append(f'<text x="{left:.1f}" y="310" text-anchor="middle">{iteration}</text>')
    parts.append(f'<text x="{x + 165}" y="330" text-anchor="middle">iteration</text>')
    for index, line in enumerate(lines):
        color, points = COLORS[index % len(COLORS)], [place(*point) for point in line]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{color}"/>' for left, top in points]
    return parts


def main() -> None:
    """Run what is missing, one after the other, and write table, JSON and plot after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/algorithms"), help="file names without ending")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHM_NAMES))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    curves: list[Curve] = []
    for algorithm in options.algorithms:
        curves.append(
            run(
                algorithm,
                config=options.config,
                runs=options.runs,
                iterations=options.iterations,
                settings=options.settings,
            )
        )
        settings = [*SETTINGS, *options.settings]
        results = {"settings": settings, "own_settings": OWN_SETTINGS, "curves": [asdict(curve) for curve in curves]}
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".svg").write_text(plot(curves))
        print(table(curves), flush=True)


if __name__ == "__main__":
    main()
