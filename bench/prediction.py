"""Does one run predict another? Models fitted to a quick start say how one with other budgets runs; then it runs.

    python bench/prediction.py run --runs DIRECTORY [--iterations 40] [--out bench/results/prediction.json]
    python bench/prediction.py read A B...

`run` makes the quick start as it is, A, and then with other budgets. `read` takes finished runs. Each B is simulated
as `pmdflow simulate` does, with engine, learner and lengths fitted to A alone, and compared after the first `WARM_UP`
iterations: seconds an iteration; the share of the learner's time that waits for groups; the share of the rollout
actors' time in named waits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from pmdflow.config.load import load_run
from pmdflow.metrics.history import History
from pmdflow.metrics.intervals import busy_share
from pmdflow.run.simulation import Simulation
from pmdflow.run.simulation.calibration import WARM_UP, Calibration, calibrate
from pmdflow.run.simulation.policies import configured

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 5
OTHERS: dict[str, tuple[str, ...]] = {
    "quarter": ("scheduler.tokens_per_iteration=4096", "scheduler.lookahead=1"),
    "synchronous": ("scheduler.lookahead=0", "scheduler.max_staleness=0", "scheduler.tokens_per_iteration=57344"),
    "twice": ("scheduler.groups_per_iteration=32", "scheduler.tokens_per_iteration=32768"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Where the time of a run went."""

    iteration_s: float
    learner_waits: float
    """Share of an iteration in which the learner waits for groups."""
    rollout_waits: float
    """Share of the rollout actors' time in which they have nothing to generate."""


def real(run: Path) -> Times:
    """What a run recorded."""
    history = History(run)
    history.update()
    records = [history.iterations[number] for number in sorted(history.iterations)][WARM_UP:]
    start, end = records[0]["time"] - records[0]["time/iteration_s"], records[-1]["time"]
    busy = busy_share(list(history.spans), "rollout", start, end)
    return Times(
        iteration_s=(end - start) / len(records),
        learner_waits=fmean(record["time/claim_wait_s"] for record in records) * len(records) / (end - start),
        rollout_waits=1 - (busy or 0.0),
    )


def predicted(run: Path, models: Calibration) -> Times:
    """What the simulator says of a run's configuration."""
    found = []
    config = load_run(run).config
    for seed in range(SEEDS):
        given = configured(
            config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})}),
            models,
            iterations=config.run.iterations,
        )
        report = Simulation(given).run()
        rest, begin = report.iterations[WARM_UP:], report.iterations[WARM_UP - 1].end_s
        seconds = rest[-1].end_s - begin
        found.append(
            Times(
                iteration_s=seconds / len(rest),
                learner_waits=sum(one.wait_s for one in rest) / seconds,
                rollout_waits=sum(report.waits_s.values()) / (report.seconds * report.actors),
            )
        )
    return Times(**{key: fmean(getattr(one, key) for one in found) for key in asdict(found[0])})


def compare(source: Path, others: list[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Print what `source` predicts of itself and of others, and what they did."""
    models = calibrate(source)
    engine, learner = models.engine, models.learner
    train_us = learner.token_s * 1e6
    print(
        f"{models.origin}: {engine.step_s * 1e3:.2f} ms a step + {engine.sequence_s * 1e3:.3f} ms a sequence, "
        f"x{engine.training_factor:.2f} beside training; {learner.iteration_s:.2f} s + {train_us:.0f} us a token "
        f"to train, {learner.publish_s:.2f} s to publish"
    )
    print(f"{'run':<24} {'s/iteration':>24} {'learner waits':>20} {'rollout waits':>20}")
    found = {}
    for run in (source, *others):
        is_, said = real(run), predicted(run, models)
        found[run.name] = {"real": asdict(is_), "predicted": asdict(said)}
        times = f"{is_.iteration_s:6.2f} said {said.iteration_s:6.2f} {said.iteration_s / is_.iteration_s - 1:+5.0%}"
        learner_waits = f"{is_.learner_waits:8.1%} said {said.learner_waits:6.1%}"
        print(f"{run.name:<24} {times} {learner_waits} {is_.rollout_waits:8.1%} said {said.rollout_waits:6.1%}")
    return found


def quick_start(runs: Path, name: str, settings: tuple[str, ...], *, iterations: int) -> Path:
    """A finished one is not repeated. Held-out prompts are few: evaluation is not simulated."""
    common = (f"run.dir={runs}", f"run.name={name}", f"run.iterations={iterations}", "eval.prompts=8")
    command = ["pmdflow", "up", "configs/quickstart.yaml", *common, "eval.every=1000", "dashboard.port=null", *settings]
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    subprocess.run(["uv", "run", *command], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return runs / name


def main() -> None:
    """Read runs, or make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    read = commands.add_parser("read", help="finished runs")
    read.add_argument("runs", nargs="+", type=Path, help="the one that predicts first")
    make = commands.add_parser("run", help="quick starts of this checkout")
    make.add_argument("--runs", type=Path, required=True)
    make.add_argument("--iterations", type=int, default=40)
    make.add_argument("--others", nargs="+", default=list(OTHERS), choices=list(OTHERS))
    for command in (read, make):
        command.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    if options.command == "read":
        source, *others = options.runs
    else:
        runs = options.runs.absolute()
        source = quick_start(runs, "as-it-is", (), iterations=options.iterations)
        others = [quick_start(runs, name, OTHERS[name], iterations=options.iterations) for name in options.others]
    found = compare(source, others)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
