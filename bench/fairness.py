"""Is what is trained a fair draw of what was admitted? Finished quick starts read; two checkouts run in turn.

    python bench/fairness.py read RUN...
    python bench/fairness.py run --seeds 5 --runs DIRECTORY [--before CHECKOUT]

`run` makes quick starts of 60 iterations, evaluated on 1,024 prompts every 5, with each seed; `--before` names another
checkout with an environment of its own, whose turn is before ours with every seed. After iteration 20, by claim:

- lag-1: autocorrelation of the mean length, its straight line removed; 0 is fair. Mean over the runs.
- variation: pooled standard deviation of that residual over the mean length, over the same when the same groups are
  dealt to the same claims at random (`SHUFFLES` times); 1 is fair.
- step: correlation of a group's optimizer step and its mean length; 0 is fair.
- masked: generated tokens without a gradient. sag: most that a held-out reward lies below the best before it.
- to 0.9: seconds until the held-out reward is 0.9.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from pmdflow.config.load import load_run
from pmdflow.metrics.fairness import lag_1, residuals
from pmdflow.metrics.history import History
from pmdflow.store.archive import parts, read_part
from pmdflow.store.plan import in_claim_order
from pmdflow.types import Float64, Int64, Mask

FIRST = 21
"""Iteration from which batches count: before it the policy learns to answer at all."""
SHUFFLES = 200
SETTINGS = ("run.iterations=60", "eval.prompts=1024", "eval.every=5", "dashboard.port=null")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """What one run showed."""

    run: str
    lag_1: float | None
    spread: float
    """Sum over claims of the squared residual of the mean length."""
    shuffled_spread: float
    """Mean of the same over the shuffles."""
    step_correlation: float
    length_by_step: list[float]
    masked_share: float
    iteration_s: float
    """Median time of an iteration."""
    held_out: list[float]
    to_90_s: float | None
    sag: float


def fairness(run: Path) -> Fairness:
    """Read one finished run."""
    history = History(run)
    history.update()
    records = [record for number, record in history.iterations.items() if number >= FIRST]
    claims = [_groups(run, path) for path in parts(run)]
    claims = [claim for claim in claims if claim.iteration >= FIRST]
    means = [claim.mean for claim in claims]
    lengths = np.concatenate([claim.lengths for claim in claims])
    steps = np.concatenate([claim.steps for claim in claims])
    begun = min(record["time"] - record["time/iteration_s"] for record in history.iterations.values())
    rounds = [history.evals[number] for number in sorted(history.evals)]
    rewards = [round_["eval/reward_mean"] for round_ in rounds]
    reached = [round_["time"] - begun for round_ in rounds if round_["eval/reward_mean"] >= 0.9]
    best = np.maximum.accumulate(rewards)
    return Fairness(
        run=str(run.name),
        lag_1=lag_1(means),
        spread=_squares(means),
        shuffled_spread=_shuffled(claims),
        step_correlation=float(np.corrcoef(steps, lengths)[0, 1]),
        length_by_step=[float(lengths[steps == step].mean()) for step in range(int(steps.max()) + 1)],
        masked_share=sum(claim.masked for claim in claims) / sum(claim.generated for claim in claims),
        iteration_s=float(np.median([record["time/iteration_s"] for record in records])),
        held_out=rewards,
        to_90_s=min(reached, default=None),
        sag=float((best - rewards).max()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The groups of one claim."""

    iteration: int
    lengths: Float64
    """Mean generated tokens of each group [G]."""
    sizes: Int64
    """Members [G]."""
    steps: Int64
    generated: int
    masked: int

    @property
    def mean(self) -> float:
        """Mean generated tokens of its trajectories."""
        return float(np.average(self.lengths, weights=self.sizes))


def _groups(run: Path, part: Path) -> Claim:
    batch = read_part(part)
    lengths = np.diff(batch.cu_seqlens) - batch.prompt_lengths
    starts = batch.group_starts()
    sizes = np.diff(np.append(starts, len(batch.groups)))
    plan = batch.plan or in_claim_order(len(starts), load_run(run).config.learner.steps_per_iteration)
    generated = (batch.mask & Mask.GENERATED) != 0
    return Claim(
        iteration=batch.iteration,
        lengths=np.add.reduceat(lengths, starts) / sizes,
        sizes=sizes,
        steps=plan.steps.astype(np.int64),
        generated=int(generated.sum()),
        masked=int((generated & ((batch.mask & Mask.TRAINED) == 0)).sum()),
    )


def _squares(means: Sequence[float]) -> float:
    return float(np.square(residuals(means)).sum())


def _shuffled(claims: Sequence[Claim]) -> float:
    """The spread if the same groups had been dealt to claims of the same sizes at random."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([claim.lengths for claim in claims])
    sizes = np.concatenate([claim.sizes for claim in claims])
    ends = np.cumsum([len(claim.lengths) for claim in claims])[:-1]
    spreads = []
    for _ in range(SHUFFLES):
        order = rng.permutation(len(lengths))
        dealt = zip(np.split(lengths[order], ends), np.split(sizes[order], ends), strict=True)
        spreads.append(_squares([float(np.average(own, weights=weights)) for own, weights in dealt]))
    return fmean(spreads)


def report(title: str, found: Sequence[Fairness]) -> None:
    """Print a line a run, and what all of them show."""
    print(f"{title}\n{'run':<16} lag-1  variation  step    masked   s/it  to 0.9  sag    final")
    for one in found:
        ratio = (one.spread / one.shuffled_spread) ** 0.5
        to_90 = "never" if one.to_90_s is None else f"{one.to_90_s:.0f} s"
        print(
            f"{one.run:<16} {_number(one.lag_1):>5}  {ratio:9.2f}  {one.step_correlation:+.2f}  {one.masked_share:7.2%}"
            f"  {one.iteration_s:5.2f}  {to_90:>6}  {one.sag:.3f}  {one.held_out[-1]:.3f}"
            f"   by step {' / '.join(f'{length:.0f}' for length in one.length_by_step)}"
        )
    lags = [one.lag_1 for one in found if one.lag_1 is not None]
    pooled = (sum(one.spread for one in found) / sum(one.shuffled_spread for one in found)) ** 0.5
    print(f"mean lag-1 {_number(fmean(lags) if lags else None)}, pooled variation {pooled:.2f}\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def run_quick_starts(checkout: Path, runs: Path, *, seed: int, tag: str) -> Path:
    """One quick start of a checkout in its own environment; a finished one is not repeated."""
    run = runs / f"{tag}-{seed}"
    settings = [f"run.dir={runs}", f"run.name={run.name}", f"run.seed={seed}", *SETTINGS]
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    command = ["uv", "run", "pmdflow", "up", "configs/quickstart.yaml", *settings]
    subprocess.run(command, check=True, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    return run


def main() -> None:
    """Read runs, or make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    read = commands.add_parser("read", help="finished runs")
    read.add_argument("runs", nargs="+", type=Path)
    make = commands.add_parser("run", help="quick starts of this checkout, and of another in turn")
    make.add_argument("--seeds", type=int, default=5)
    make.add_argument("--runs", type=Path, required=True)
    make.add_argument("--before", type=Path)
    for command in (read, make):
        command.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    if options.command == "read":
        found = {"runs": [fairness(run) for run in options.runs]}
    else:
        sides = {"before": options.before} if options.before else {}
        sides["now"] = Path(__file__).resolve().parents[1]
        made: dict[str, list[Path]] = {side: [] for side in sides}
        for seed in range(options.seeds):
            for side, checkout in sides.items():
                made[side].append(run_quick_starts(checkout, options.runs.absolute(), seed=seed, tag=side))
        found = {side: [fairness(run) for run in own] for side, own in made.items()}
    for title, own in found.items():
        report(title, own)
    if options.out:
        options.out.write_text(
            json.dumps({side: [asdict(one) for one in own] for side, own in found.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
