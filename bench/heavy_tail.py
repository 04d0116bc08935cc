"""How much throughput does a strict bound on age cost under a heavy tail? Simulated, on the real store and scheduler.

    python bench/heavy_tail.py [--iterations 20] [--only TEXT]

Lognormal lengths (median 3,000, 99th percentile 32,000 tokens, cut at 32,768), 32 rollout actors of 16 slots, claims of
64 groups of 8, training in half the time that generation takes without a bubble. The default is lookahead 2 with tokens
at most 4 iterations old, the whole buffer as window. "unbounded" runs 8 iterations ahead and trains tokens of any age;
shares are of its generated tokens a second in claims. A simulated token stands for 64. Beside it, on the same workload:

- AReaL's counter admission: as many samples are admitted as eta + 1 batches beyond the version, finished ones are taken
  oldest first, tokens of any age are trained. In our terms lookahead eta without a bound on age.
- wait: the learner waits for old groups, so that nothing is masked. In our terms the widest window with which the bound
  holds by itself, lookahead + (window - 1) / 64 rounded up (the proof is in `rust_buffer/src/store/claims.rs`).
- drop and refill: a group with a token that is older than the bound is thrown away, and another admitted.
- DORA: K versions at a time, one a trajectory. APRIL: more groups than an iteration needs, at lookahead 0.
- TitanRL: a window of 0.3 of a buffer of (eta + 1) batches, without a bound on age.

`old` is the share of trained tokens that are older than 4 iterations, `dropped` the tokens thrown away over those
generated, `length` the mean length of trained groups: less than that of the others is a
bias towards short answers.
Writes `bench/results/heavy_tail.json`, `.md` and `.svg`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pmdflow._rust_buffer import Conflict
from pmdflow.run.scheduler import SchedulerSettings
from pmdflow.run.simulation import EngineModel, LearnerModel, LognormalLengths, Simulation, SimulationSettings

RESULTS = Path(__file__).parent / "results"
UNIT = 64
GROUPS, SIZE = 64, 8
MOST = 32_768
LENGTHS = LognormalLengths(median=3000 / UNIT, p99=32_000 / UNIT)
STEP_S = 0.025 * UNIT
ACTORS, SLOTS = 32, 16
BOUND = 4
SKIP = 10
DROP = "drop and refill"


class DropAndRefill(Simulation):
    """Throws away groups that would have a token beyond the bound at the next claim."""

    def __init__(self, settings: SimulationSettings) -> None:
        super().__init__(settings)
        self._begun: dict[int, int] = {}
        """Version of the first token of each group."""

    def _lease(self, index: int, now: float, *, delay_s: float = 0.0) -> bool:
        leased = super()._lease(index, now, delay_s=delay_s)
        for trajectory in self._workers[index].running:
            self._begun.setdefault(trajectory // SIZE, self._version)
        return leased

    def _admit(self) -> int:
        for group, version in list(self._begun.items()):
            if version < self._version - BOUND:
                del self._begun[group]
                with suppress(Conflict):  # a claim has it
                    self._store.discard(group, "too old")
        return super()._admit()


def setting(*, iterations: int) -> SimulationSettings:
    """The default: asynchronous, lookahead 2, at most `BOUND` iterations old."""
    tokens = GROUPS * SIZE * LENGTHS.mean(MOST / UNIT)
    generation_s = tokens * STEP_S / (ACTORS * SLOTS)
    return SimulationSettings(
        scheduler=SchedulerSettings(
            groups_per_iteration=GROUPS, tokens_per_iteration=1 << 40, tokens_per_segment=None, lookahead=2
        ),
        max_staleness=BOUND,
        iterations=iterations + SKIP,
        group_size=SIZE,
        max_tokens=MOST // UNIT,
        lengths=LENGTHS,
        engine=EngineModel(slots=SLOTS, step_s=STEP_S),
        learner=LearnerModel(iteration_s=0.0, token_s=generation_s / 2 / tokens),
        actors=ACTORS,
        grant_tokens=MOST // UNIT,
    )


def rows(given: SimulationSettings) -> Iterator[tuple[str, SimulationSettings]]:
    """What is compared, the reference first."""

    def like(**numbers: Any) -> SimulationSettings:
        scheduled = set(SchedulerSettings.__slots__) - set(SimulationSettings.__slots__)
        own = {name: numbers.pop(name) for name in list(numbers) if name in scheduled}
        if own.get("lookahead") == 0:  # what is granted goes on while the learner trains: as little as in a real run
            numbers["grant_tokens"] = 1024 // UNIT
        return replace(given, scheduler=replace(given.scheduler, **own), **numbers)

    segment = given.max_tokens // 4
    yield "unbounded", like(lookahead=8, max_staleness=None)
    yield "default", given
    yield "AReaL's counter, eta 4", like(lookahead=4, max_staleness=None)
    yield "AReaL's counter, eta 2", like(lookahead=2, max_staleness=None)
    yield DROP, given
    yield "wait", like(window=(BOUND - 2) * GROUPS, max_staleness=BOUND)
    yield "TitanRL's window, 0.3 of 5 batches", like(lookahead=4, window=96, max_staleness=None)
    yield "TitanRL's window, 0.3 of 9 batches", like(lookahead=8, window=172, max_staleness=None)
    for versions in (2, 3, 5):
        yield f"DORA, {versions} versions", like(versions=versions)
    yield "DORA, 5 versions, lookahead 4", like(versions=5, lookahead=4)
    for extra in (GROUPS // 2, GROUPS):
        yield f"APRIL, {1 + extra / GROUPS:g} x", like(lookahead=0, extra_groups=extra)
    yield "synchronous", like(lookahead=0, max_staleness=0)
    yield "Kimi k1.5, 4 segments", like(lookahead=0, tokens_per_segment=segment, max_staleness=None)
    for lookahead in (1, 2, 3, 4):
        for bound in (4, 6, 8):
            if (lookahead, bound) != (2, BOUND):
                yield f"lookahead {lookahead}, age {bound}", like(lookahead=lookahead, max_staleness=bound)
    for window in (64, 96, 160):
        yield f"lookahead 2, age 4, window {window}", like(window=window)


def simulate(name: str, settings: SimulationSettings) -> dict[str, Any]:
    """The numbers of one row; lengths and throughput in tokens."""
    report = (DropAndRefill if name == DROP else Simulation)(settings).run()
    steady = report.steady(skip=SKIP)
    rest = report.iterations[SKIP:]
    ages: dict[int, int] = {}
    for iteration in rest:
        for age, tokens in iteration.ages.items():
            ages[age] = ages.get(age, 0) + tokens
    old = sum(tokens for age, tokens in ages.items() if age > BOUND) / sum(ages.values())
    dropped = sum(tokens for place, tokens in report.ledger.items() if place.startswith("evicted"))
    return {
        **asdict(steady),
        "tokens_per_s": steady.tokens_per_s * UNIT,
        "old": old,
        "dropped": dropped / report.ledger["generated"],
        "length": fmean(length for iteration in rest for length in iteration.lengths) * UNIT,
        "rollout_busy": report.busy_s / (report.seconds * report.actors),
        "lookahead": settings.scheduler.lookahead,
        "max_staleness": settings.max_staleness,
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows in Markdown."""
    best = found["unbounded"]["tokens_per_s"]
    head = ("policy", "tokens/s", "share", "masked", "of the longest tenth", "old", "dropped", "age", "most", "length")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in found.items():
        cells = (
            name,
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / best:.1%}",
            f"{row['masked_share']:.2%}",
            f"{row['masked_by_decile'][-1]:.1%}",
            f"{row['old']:.2%}",
            f"{row['dropped']:.1%}",
            f"{row['staleness_mean']:.2f}",
            f"{row['staleness_max']}",
            f"{row['length']:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Throughput against what is masked, dropped or trained beyond the bound, as SVG."""
    best = found["unbounded"]["tokens_per_s"]
    body = [_text(500, 22, "share of the unbounded throughput, against tokens masked or dropped", anchor="middle")]
    for share in range(11):
        x, y = 70 + 70 * share, 430 - 38 * share
        body.append(
            _text(x, 450, f"{5 * share} %", anchor="middle") + _text(60, y + 4, f"{10 * share} %", anchor="end")
        )
        body.append(f'<path d="M70 {y}H770M{x} 430V50" stroke="#eee"/>')
    for number, (name, row) in enumerate(found.items(), start=1):
        lost = min(row["masked_share"] + row["dropped"], 0.5)
        x, y = 70 + 1400 * lost, 430 - 380 * row["tokens_per_s"] / best
        kind = "#c60" if name == "default" else "#36c" if name.startswith("lookahead") else "#393"
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{kind}"/>' + _text(x + 5, y - 4, str(number)))
        body.append(_text(785, 36 + 13 * number, f"{number}  {name}"))
    style = 'font-family="sans-serif" font-size="11"'
    height = max(470, 60 + 13 * len(found))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1020 {height}" {style}>'
    return "\n".join([head, f'<rect width="1020" height="{height}" fill="white"/>', *body, "</svg>\n"])


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def main() -> None:
    """Simulate every row, print each as it comes, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--out", type=Path, default=RESULTS / "heavy_tail.json")
    options = parser.parse_args()
    given = setting(iterations=options.iterations)
    found: dict[str, dict[str, Any]] = {}
    for name, settings in rows(given):
        if name == "unbounded" or options.only in name:
            found[name] = simulate(name, settings)
            print(table({"unbounded": found["unbounded"], name: found[name]}).splitlines()[-1], flush=True)
            write(options.out, options.iterations, found)


def write(out: Path, iterations: int, found: Mapping[str, Mapping[str, Any]]) -> None:
    """JSON, and beside it the table and the plot."""
    mean = LENGTHS.mean(MOST / UNIT) * UNIT
    longest = MOST / (GROUPS * SIZE * mean / (ACTORS * SLOTS))
    said = (
        f"Written by `bench/heavy_tail.py`, which says how: {iterations} iterations a row after {SKIP}.\n\n"
        f"An answer of {MOST:,} tokens takes {longest:.1f} times as long as an iteration without a bubble "
        f"(the mean answer has {mean:,.0f} tokens), so it cannot be younger at its end, whatever the policy."
    )
    out.write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text(f"# A heavy tail of lengths\n\n{said}\n\n{table(found)}\n")
    out.with_suffix(".svg").write_text(plot(found))


if __name__ == "__main__":
    main()
