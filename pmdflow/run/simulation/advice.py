"""What would run better, and by how much: one answer for `pmdflow simulate`, the dry run and the page of a live run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from pmdflow.config.schema import Config
from pmdflow.metrics.text import percent
from pmdflow.run.simulation.calibration import Calibration
from pmdflow.run.simulation.policies import (
    AS_CONFIGURED,
    UNBOUNDED,
    configured,
    ranks_beside,
    shrunk,
    splits,
    unit_of,
    variants,
)  # fmt: skip
from pmdflow.run.simulation.report import SimulationReport, Steady
from pmdflow.run.simulation.settings import SimulationSettings
from pmdflow.run.simulation.world import Simulation

SKIPPED = 4
"""First iterations that are left out: the pipeline fills."""
ENOUGH, RARELY = 0.97, 0.01
"""Share of the unbounded throughput that a bound should reach, and of tokens that it may mask."""
SHORT, FEW = 12, 64
"""Iterations of each simulation, and trajectories of a claim, where the answer has to be quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One simulated policy."""

    name: str
    settings: SimulationSettings
    """Of the whole job."""
    part: int
    """One of so many parts of it was simulated."""
    report: SimulationReport
    steady: Steady

    @property
    def rollout_busy(self) -> float:
        """Share of the rollout actors' time with something to generate."""
        return self.report.busy_s / (self.report.seconds * self.report.actors) if self.report.seconds else 0.0

    @property
    def waits(self) -> list[tuple[str, float]]:
        """Shares of the rollout actors' time with nothing to generate, by cause, the greatest first."""
        whole = self.report.seconds * self.report.actors
        shares = ((cause, seconds / whole) for cause, seconds in self.report.waits_s.items() if whole)
        return sorted(shares, key=lambda item: -item[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A configuration, its alternatives, and what would be better."""

    origin: str
    """Where the models are from."""
    results: Sequence[Result]
    """The configuration and other modes."""
    divided: Sequence[Result]
    """The same with the processors divided otherwise."""
    lines: Sequence[str]
    """What to change, with the expected gain."""


def advise(config: Config, models: Calibration, *, iterations: int = SHORT, seconds: float | None = None) -> Advice:
    """Simulate a configuration and its alternatives, and say which are better.

    Args:
        config: The configuration.
        models: Of engine, learner and lengths.
        iterations: Of each simulation, after the first few.
        seconds: Most that it may take, by the clock; what is not simulated by then is left out, which a line says, and
            of a large job a part is simulated. None takes as long as it takes.
    """
    given = configured(config, models, iterations=iterations + SKIPPED)
    most = sys.maxsize if seconds is None else FEW
    modes, shares = list(variants(given, in_turn=config.cluster.colocate)), list(splits(given, config))
    order = {name: place for place, (name, _) in enumerate(modes)}
    modes.sort(key=lambda mode: mode[0] not in (AS_CONFIGURED, UNBOUNDED))
    end = None if seconds is None else time.monotonic() + seconds
    done = list(_within(chain(modes, shares), trajectories=most, end=end))
    names = {name for name, _ in shares}
    results = sorted((result for result in done if result.name not in names), key=lambda result: order[result.name])
    divided = [result for result in done if result.name in names]
    lines = list(_lines(results, divided, config)) if len(results) > 1 else []
    if len(done) < len(modes) + len(shares):
        left = len(modes) + len(shares) - len(done)
        lines.append(f"{left} of {len(modes) + len(shares)} simulations were left out after {seconds:g} s")
    return Advice(origin=models.origin, results=results, divided=divided, lines=lines)


def _within(
    simulations: Iterable[tuple[str, SimulationSettings]], *, trajectories: int, end: float | None
) -> Iterator[Result]:
    """Results with at most about so many trajectories a claim, until the clock is at `end`."""

    def is_late() -> bool:
        return end is not None and time.monotonic() > end

    for name, settings in simulations:
        smaller, part = shrunk(settings, trajectories=trajectories)
        try:
            report = Simulation(smaller).run(give_up=is_late)
        except TimeoutError:
            return
        yield Result(name=name, settings=settings, part=part, report=report, steady=report.steady(skip=SKIPPED))


def _lines(results: Sequence[Result], divided: Sequence[Result], config: Config) -> Iterator[str]:
    by_name = {result.name: result for result in results}
    now = by_name[AS_CONFIGURED].steady
    if UNBOUNDED not in by_name:
        yield f"as configured: {_masked(now)}; engines and learner have the devices in turn, so that nothing runs ahead"
        return
    best = by_name[UNBOUNDED].steady.tokens_per_s
    share = now.tokens_per_s / best if best else 1.0
    yield f"as configured: {percent(share)} of the throughput without a bound on age, {_masked(now)}"
    ahead = _best([result for result in results if result.name.startswith("lookahead")], now, enough=ENOUGH * best)
    if ahead is not None:
        yield f"{_changes(ahead, config)}: {_gain(ahead, now)}, {_masked(ahead.steady)}"
    split = _best(divided, now, enough=float("inf"))
    if split is not None:
        actors, ranks = split.settings.actors, ranks_beside(split.settings.actors, config)
        yield f"rollout.actors={actors} and learner.ranks={ranks}: {_gain(split, now)}, {_masked(split.steady)}"
    if ahead is None and split is None:
        yield f"no other lookahead, budget or division of processors that masks at most {percent(RARELY)} is faster"


def _best(results: Sequence[Result], now: Steady, *, enough: float) -> Result | None:
    """The first that is fast enough, else the fastest; None unless it is better, and masks next to nothing."""
    whole = [result for result in results if result.steady.masked_share <= RARELY]
    fastest = max(whole, key=lambda result: result.steady.tokens_per_s, default=None)
    best = next((result for result in whole if result.steady.tokens_per_s >= enough), fastest)
    if best is None:
        return None
    gain = best.steady.tokens_per_s / now.tokens_per_s
    return best if gain > 1 / ENOUGH or (now.masked_share > RARELY and gain >= ENOUGH) else None


def _gain(result: Result, now: Steady) -> str:
    return f"{result.steady.tokens_per_s / now.tokens_per_s:.2f} times the tokens a second"


def _masked(steady: Steady) -> str:
    return f"{percent(steady.masked_share, 1)} of its tokens masked"


def _changes(result: Result, config: Config) -> str:
    """The settings in which a simulated one differs from the configuration."""
    scheduler, changes = config.scheduler, []
    lookahead, bound = result.settings.scheduler.lookahead, result.settings.max_staleness
    if lookahead != scheduler.lookahead:
        changes.append(f"scheduler.lookahead={lookahead}")
    if bound != scheduler.max_staleness:
        changes.append(f"scheduler.max_staleness={bound}")
    changes += ["scheduler.extra_groups=0"] if scheduler.extra_groups else []
    changes += [f"scheduler.{name}=null" for name in ("versions", "policy") if getattr(scheduler, name) is not None]
    if config.rollout.tokens_per_segment is not None:
        changes.append("rollout.tokens_per_segment=null")
    spent = 2 * result.part * unit_of(config) * max(iteration.tokens for iteration in result.report.iterations)
    if scheduler.tokens_per_iteration == "auto" or scheduler.tokens_per_iteration < spent:
        changes.append(f"scheduler.tokens_per_iteration={_round_up(spent)} or more")
    return ", ".join(changes)


def _round_up(tokens: int) -> int:
    digit: int = 10 ** max(len(str(tokens)) - 2, 0)
    return -(-tokens // digit) * digit
