"""verl's published 128-GPU experiment in the simulator: what synchronous rows say of the asynchronous one, and of ours.

    python bench/verl_async.py [--iterations 8]

Published (verl, docs/advance/fully_async.md): Qwen2.5-Math-7B, DAPO, 512 x 16 answers of 28k tokens at most.

| | GPUs | step | generation | old log-probs | update | rest |
|---|---|---|---|---|---|---|
| synchronous | 128 | 356.30 s | 177.85 | 53.92 | 113.81 | 10.72 |
| synchronous | 64 | 365.28 s | 150.72 | 70.26 | 133.41 | 10.89 |
| asynchronous | 64 + 64 | 150.63 s | 33.14 (waiting) | none | 113.16 | 4.33 |

2.35 to 2.67 times by wall clock. What follows was fixed from the synchronous rows, before anything asynchronous was
simulated; each with a name but `step` is also varied by 30 % down and up:

- `median`: lengths are lognormal with their 99th percentile at the limit, as in `heavy_tail.py`, and its median scaled:
  nothing is published of them.
- `batch`: a step of 64 sequences, those of a synchronous engine at its begin, takes 1.5 times as long as one of one
  sequence. `step` follows: generation alone takes 177.85 s.
- `update`: on 64 GPUs as in the synchronous row of 64 GPUs; the same for the pass over old log-probs.
- `rest`: that of the synchronous row, once an iteration, while rollout goes on.
- verl's asynchronous mode: tokens of any age, at most 1.5 x 512 prompts between two weight updates (its
  staleness_threshold 0.5), the generator's log-probs (no pass). Its trainer begins with 128 of the 512 prompts:
  simulated without ("whole") and with ("streamed": iterations of 128 prompts, each published).

Then ours, strictly: no trained token is older than 1 iteration at lookahead 1 (what 1.5 batches stand for), or than 3
at lookahead 2 (as old as verl's are in the streamed mode), the rest masked; with the generator's log-probs
(`learner.anchor: behavior`), and with a pass of our own.
An eighth of the machine is simulated: 64 prompts x 16, 16 engines or 8. Writes `bench/results/verl_async.md`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pmdflow.run.policies import Decision, asynchronous
from pmdflow.run.scheduler import SchedulerSettings
from pmdflow.run.simulation import EngineModel, LearnerModel, LognormalLengths, Simulation, SimulationSettings
from pmdflow.types import Counts

RESULTS = Path(__file__).parent / "results"
PART = 8
GROUPS, SIZE, ENGINES, SLOTS = 512 // PART, 16, 128 // PART, 256
LIMIT, UNIT = 28 * 1024, 56
STEP_S, GENERATION_S, REST_S = 356.30, 177.85, 10.72
UPDATE_S, LOGPROBS_S = 133.41, 70.26
"""On 64 GPUs."""
PUBLISHED_S, PUBLISHED_GAIN = 150.63, (2.35, 2.67)
AHEAD = 0.5
SKIP = 4
MODES = ("whole", "streamed", "ours, age 1", "ours, age 3", "ours, age 3, with a pass")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What the synchronous rows do not say."""

    median: float = LIMIT * 3 / 32
    batch: float = 0.5
    update: float = UPDATE_S
    rest: float = REST_S


def half_ahead(settings: SchedulerSettings, counts: Counts) -> Decision:
    """1.5 batches between two weight updates, however large a claim is."""
    return replace(asynchronous(settings, counts), groups=round((1 + AHEAD) * GROUPS))


def workload(given: Assumptions, *, step_s: float, engines: int, iterations: int) -> SimulationSettings:
    """A synchronous run; the learner's time is that of a whole batch."""
    tokens = LIMIT // UNIT
    return SimulationSettings(
        scheduler=SchedulerSettings(
            groups_per_iteration=GROUPS, tokens_per_iteration=1 << 40, tokens_per_segment=None, lookahead=0
        ),
        max_staleness=None,
        iterations=iterations,
        group_size=SIZE,
        max_tokens=tokens,
        lengths=LognormalLengths(median=given.median / UNIT, p99=LIMIT / UNIT),
        engine=EngineModel(slots=SLOTS, step_s=step_s, sequence_s=step_s * given.batch / 64),
        learner=LearnerModel(iteration_s=given.update, publish_s=given.rest),
        actors=engines,
        grant_tokens=tokens,
    )


@cache
def step_of(given: Assumptions) -> float:
    """Seconds of a step of one sequence, with which synchronous generation takes as long as published."""
    run = Simulation(workload(given, step_s=1.0, engines=ENGINES, iterations=4)).run()
    return GENERATION_S / (sum(iteration.wait_s for iteration in run.iterations) / len(run.iterations))


def simulate(given: Assumptions, mode: str, *, iterations: int) -> tuple[float, float, int]:
    """Seconds an iteration of 512 prompts, masked share and greatest age in iterations."""
    base = workload(given, step_s=step_of(given), engines=ENGINES // 2, iterations=iterations + SKIP)
    scheduler = replace(base.scheduler, lookahead=1)
    settings, parts = replace(base, scheduler=replace(scheduler, policy=half_ahead)), 1
    if mode == "streamed":
        parts = 4
        scheduler = replace(settings.scheduler, groups_per_iteration=GROUPS // parts)
        learner = LearnerModel(iteration_s=given.update / parts, publish_s=given.rest / parts)
        settings = replace(settings, scheduler=scheduler, learner=learner, iterations=parts * (iterations + SKIP))
    elif mode.startswith("ours"):
        passes_s = LOGPROBS_S if mode.endswith("pass") else 0.0
        learner = LearnerModel(iteration_s=given.update + passes_s, publish_s=given.rest)
        age = 3 if "3" in mode else 1
        settings = replace(
            base, scheduler=replace(scheduler, lookahead=2 if age == 3 else 1), max_staleness=age, learner=learner
        )
    steady = Simulation(settings).run().steady(skip=parts * SKIP)
    return parts * steady.iteration_s, steady.masked_share, -(-steady.staleness_max // parts)


def main() -> None:
    """Print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=8)
    options = parser.parse_args()
    lines = [
        "# verl's 128-GPU experiment",
        "",
        (
            f"Written by `bench/verl_async.py`, which says how. Published: {PUBLISHED_S} s a step asynchronously, "
            f"{PUBLISHED_GAIN[0]} to {PUBLISHED_GAIN[1]} times the synchronous {STEP_S} s."
        ),
        "",
        "| assumptions | mode | s an iteration | gain | masked | oldest trained |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines[4:]))
    rows = [("as fixed", Assumptions(), mode) for mode in MODES]
    for name in ("median", "batch", "update", "rest"):
        for factor in (0.7, 1.3):
            varied = replace(Assumptions(), **{name: factor * getattr(Assumptions(), name)})
            rows += [(f"{name} x {factor}", varied, mode) for mode in MODES[1:4:2]]
    for name, given, mode in rows:
        iteration_s, masked, oldest = simulate(given, mode, iterations=options.iterations)
        title = mode if mode.startswith("ours") else f"verl, {mode}"
        lines.append(f"| {name} | {title} | {iteration_s:.0f} | {STEP_S / iteration_s:.2f} | {masked:.1%} | {oldest} |")
        print(lines[-1], flush=True)
        (RESULTS / "verl_async.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
