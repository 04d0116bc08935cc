"""Is there an order of work that wins? Each idea in the simulator, beside the order that the store has.

    python bench/order.py [--seeds 5] [--iterations 60] [--from RUN] [--out bench/results/order.json]

Workloads: a quarter of the heavy tail of `heavy_tail.py` (8 rollout actors, claims of 16 groups), asynchronous,
synchronous with half of the slots filled and as Kimi k1.5, and with `--from` that run's configuration, times and
lengths. Ideas, each at the same bound on age:

- long first: groups admitted together are started in the order of their expected length, as another group of the same
  prompt had it ("sibling");
- long first, all: among all that wait, whenever admitted, by what their own longest member will have ("oracle": more
  than any predictor knows);
- even: a worker takes no more of what waits than its share of it, so that few sequences are spread over all workers;
- free prefixes: a continued trajectory costs no prefill, as if its prefix were always in its worker's cache: more than
  any preference for that worker can give. Beside it, prefill at `PREFILL_S` a token.

A row's numbers are means over seeds; the difference is paired by seed, with its standard error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import heavy_tail
import numpy as np

from pmdflow.config.load import load_run
from pmdflow.run.scheduler import decide
from pmdflow.run.simulation import EngineModel, Simulation, SimulationSettings
from pmdflow.run.simulation.calibration import calibrate
from pmdflow.run.simulation.policies import configured, shrunk
from pmdflow.types import Prompt

SKIP = 10
PREFILL_S = 1e-4 * heavy_tail.UNIT
"""Seconds of prefill for each simulated token: 10,000 tokens a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order of work."""

    name: str
    expect: Literal["nothing", "sibling", "oracle"] = "nothing"
    among: Literal["admission", "all"] = "admission"
    even: bool = False


class Ordered(Simulation):
    """A simulation whose groups are started in another order."""

    def __init__(self, settings: SimulationSettings, order: Order) -> None:
        super().__init__(settings)
        self._by = order
        self._others = np.random.default_rng([settings.seed, 1])
        self._batch = 0

    def _admit(self) -> int:
        settings, counts = self._settings, self._store.counts()
        room = decide(settings.scheduler, counts).room(counts)
        drawn = [settings.lengths.group(self._rng, settings.group_size) for _ in range(room)]
        cut = [[min(length, settings.max_tokens) for length in group] for group in drawn]
        expected = [self._expected(group) for group in cut]
        self._batch -= 1
        groups = []
        for place, cursor in enumerate(range(counts.next_cursor, counts.next_cursor + room)):
            rank = sum(other < expected[place] for other in expected)
            priority = int(expected[place]) if self._by.among == "all" else self._batch * 10_000 + rank
            group = self._store.admit(
                f"train-{cursor}", Prompt(id=str(cursor), text="", tokens=np.zeros(settings.prompt_tokens, np.int32)),
                cursor=cursor, group_size=settings.group_size, max_tokens=settings.max_tokens, priority=priority,
            )  # fmt: skip
            self._answers.given(group, cut[place])
            groups.append(group)
        self._order.admitted(groups, iteration=len(self._report.iterations) + 1)
        report = self._report
        report.max_groups_untrained = max(report.max_groups_untrained, counts.groups_untrained + room)
        return room

    def _expected(self, group: list[int]) -> float:
        if self._by.expect == "nothing":
            return 0.0
        return float(np.mean(self._others.choice(group, len(group))) if self._by.expect == "sibling" else max(group))

    def _lease(self, index: int, now: float, *, delay_s: float = 0.0) -> bool:
        if not self._by.even:
            return super()._lease(index, now, delay_s=delay_s)
        worker = self._workers[index]
        held = sum(len(other.running) for other in self._workers)
        whole = worker.engine
        share = -(-(held + self._store.counts().trajectories_idle) // len(self._workers))
        worker.engine = replace(whole, slots=max(min(whole.slots, share), len(worker.running)))
        try:
            return super()._lease(index, now, delay_s=delay_s)
        finally:
            worker.engine = whole


ORDERS = (
    Order(name="as it is"),
    Order(name="long first, sibling", expect="sibling"),
    Order(name="long first, all, oracle", expect="oracle", among="all"),
    Order(name="even", even=True),
)


def workloads(run: Path | None, *, iterations: int) -> Iterator[tuple[str, SimulationSettings]]:
    """Name and settings of each."""
    given, _ = shrunk(heavy_tail.setting(iterations=iterations), trajectories=128)
    scheduler = given.scheduler
    k15 = replace(scheduler, lookahead=0, tokens_per_segment=given.max_tokens // 4)
    yield "heavy tail, asynchronous", given
    yield "heavy tail, lookahead 4", replace(given, scheduler=replace(scheduler, lookahead=4), max_staleness=8)
    yield "heavy tail, half filled", replace(
        given, scheduler=replace(scheduler, lookahead=0, groups_per_iteration=8), max_staleness=0,
        engine=replace(given.engine, step_s=0.5 * given.engine.step_s, sequence_s=0.5 * given.engine.step_s / 16),
    )  # fmt: skip
    yield "heavy tail, Kimi k1.5", replace(given, scheduler=k15, max_staleness=None)
    if run is not None:
        config = load_run(run).config
        yield "quick start", configured(config, calibrate(run), iterations=iterations + SKIP)


def measure(settings: SimulationSettings, order: Order) -> dict[str, float]:
    report = Ordered(settings, order).run()
    steady = report.steady(skip=SKIP)
    return {
        "tokens_per_s": steady.tokens_per_s, "masked": steady.masked_share, "longest": steady.masked_by_decile[-1],
        "age": steady.staleness_mean, "passed": steady.passed,
    }  # fmt: skip


def compare(name: str, settings: SimulationSettings, seeds: int) -> list[dict[str, Any]]:
    """Every order on one workload; prints a line each."""
    rows = []
    free = replace(settings, engine=_with_prefill(settings.engine, 0.0))
    paid = replace(settings, engine=_with_prefill(settings.engine, PREFILL_S))
    sides = [(order.name, settings, order) for order in ORDERS]
    if settings.scheduler.tokens_per_segment is not None:
        sides += [("prefixes prefilled", paid, ORDERS[0]), ("free prefixes", free, ORDERS[0])]
    base: list[dict[str, float]] = []
    for title, one, order in sides:
        found = [measure(replace(one, seed=seed), order) for seed in range(seeds)]
        if not base or title == "prefixes prefilled":
            base = found
        gains = [own["tokens_per_s"] / other["tokens_per_s"] - 1 for own, other in zip(found, base, strict=True)]
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        mean = {key: fmean(one[key] for one in found) for key in found[0]}
        rows.append({"workload": name, "order": title, "gain": fmean(gains), "error": error, **mean})
        print(
            f"{name:<26} {title:<26} {fmean(gains):+7.2%} +- {error:.2%}   masked {mean['masked']:.2%} "
            f"(longest {mean['longest']:.2%})  age {mean['age']:.2f}  passed {mean['passed']:.0f}",
            flush=True,
        )
    return rows


def _with_prefill(engine: EngineModel, seconds: float) -> EngineModel:
    return replace(engine, prefill_s=seconds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--from", dest="run", type=Path, help="a run of the quick start")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    rows = []
    for name, settings in workloads(options.run, iterations=options.iterations):
        rows += compare(name, settings, options.seeds)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
