"""How much throughput does a strict bound on age cost under a heavy tail? Simulated, on the real store and scheduler.

    python bench/heavy_tail.py [--iterations 60] [--out bench/results/heavy_tail.json]

Lognormal lengths (median 3,000, 99th percentile 32,000 tokens), 32 rollout actors of 16 slots, claims of 64 groups of
8, training in half the time that generation takes without a bubble. A simulated token stands for 64. Rows vary the
bound on age, the lookahead and the window; "unbounded" runs 8 iterations ahead and trains tokens of any age. Shares are
of its throughput.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from pmdflow.run.scheduler import SchedulerSettings
from pmdflow.run.simulation import EngineModel, LearnerModel, LognormalLengths, Simulation, SimulationSettings

UNIT = 64
GROUPS, SIZE = 64, 8
MOST = 32_768
LENGTHS = LognormalLengths(median=3000 / UNIT, p99=32_000 / UNIT)
STEP_S = 0.025 * UNIT
ACTORS, SLOTS = 32, 16
SKIP = 10


def setting(*, iterations: int) -> SimulationSettings:
    """Asynchronous, lookahead 2, at most 4 iterations old."""
    tokens = GROUPS * SIZE * LENGTHS.mean(MOST / UNIT)
    generation_s = tokens * STEP_S / (ACTORS * SLOTS)
    return SimulationSettings(
        scheduler=SchedulerSettings(
            groups_per_iteration=GROUPS, tokens_per_iteration=1 << 40, tokens_per_segment=None, lookahead=2
        ),
        max_staleness=4,
        iterations=iterations + SKIP,
        group_size=SIZE,
        max_tokens=MOST // UNIT,
        lengths=LENGTHS,
        engine=EngineModel(slots=SLOTS, step_s=STEP_S),
        learner=LearnerModel(iteration_s=0.0, token_s=generation_s / 2 / tokens),
        actors=ACTORS,
        grant_tokens=16,
    )


def rows(given: SimulationSettings) -> Iterator[tuple[str, SimulationSettings]]:
    """What is compared."""
    scheduler = given.scheduler
    yield "unbounded", replace(given, scheduler=replace(scheduler, lookahead=8), max_staleness=None)
    for lookahead in (1, 2, 3, 4):
        for bound in sorted({lookahead, 4, 6, 8}):
            if bound >= lookahead:
                name = f"lookahead {lookahead}, age {bound}"
                yield name, replace(given, scheduler=replace(scheduler, lookahead=lookahead), max_staleness=bound)
    buffer = scheduler.active_groups
    for share in (0.34, 0.5, 0.75):
        yield f"window {share:g} of the buffer", replace(given, window=max(GROUPS, round(share * buffer)))
    yield "synchronous", replace(given, scheduler=replace(scheduler, lookahead=0), max_staleness=0)
    segment = given.max_tokens // 4
    k15 = replace(scheduler, lookahead=0, tokens_per_segment=segment)
    yield "Kimi k1.5, 4 segments", replace(given, scheduler=k15, max_staleness=None)
    yield "segments of 1/4, lookahead 2", replace(given, scheduler=replace(scheduler, tokens_per_segment=segment))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    found = {}
    best = None
    columns = f"{'tokens/s':>9} {'share':>6} {'masked':>7} {'longest':>8} {'age':>5} {'most':>4} {'passed':>6}"
    print(f"{'':<32} {columns} lag-1  varies")
    for name, settings in rows(setting(iterations=options.iterations)):
        report = Simulation(settings).run()
        steady = report.steady(skip=SKIP)
        best = best or steady.tokens_per_s
        found[name] = {**asdict(steady), "share": steady.tokens_per_s / best}
        lag_1 = "-" if steady.lag_1 is None else f"{steady.lag_1:+.2f}"
        print(
            f"{name:<32} {steady.tokens_per_s * UNIT:>9,.0f} {steady.tokens_per_s / best:>6.1%} "
            f"{steady.masked_share:>7.2%} {steady.masked_by_decile[-1]:>8.2%} {steady.staleness_mean:>5.2f} "
            f"{steady.staleness_max:>4} {steady.passed:>6} {lag_1} {steady.variation or 0:>7.2f}",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
