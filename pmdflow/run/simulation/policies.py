"""From a configuration to simulations: as it is, and as others would run the same job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from pmdflow.config.gpus import planned_gpus
from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.run.scheduler import SchedulerSettings, grant_tokens
from pmdflow.run.simulation.calibration import Calibration
from pmdflow.run.simulation.models import EngineModel, LearnerModel, Lengths, LognormalLengths, RecordedLengths
from pmdflow.run.simulation.settings import SimulationSettings

UNITS = 512
"""Units of a simulated trajectory of full length: where answers are longer, a unit is several tokens."""
AS_CONFIGURED, UNBOUNDED = "as configured", "unbounded"
K15_SEGMENTS = 4
"""Iterations over which k1.5 generates an answer of full length."""
DORA_VERSIONS = 3
"""Policy versions at a time, where the configuration names none."""
FAR_AHEAD = 8
"""Lookahead that stands for no bound."""
DECODE_STEP_S = 0.025
LENGTH_SHARE = 8
"""Without a run to learn from, the median answer has this part of `max_tokens`, and the 99th percentile all of it."""


def assumed(config: Config) -> Calibration:
    """Models without a run to fit them to; training takes half the time of generation without a bubble."""
    most = config.data.max_tokens
    lengths = LognormalLengths(median=most / LENGTH_SHARE, p99=most)
    slots = config.rollout.slots or DEFAULT_SLOTS
    tokens = config.scheduler.groups_per_iteration * config.data.group_size * lengths.mean(most)
    generation_s = tokens * DECODE_STEP_S / (config.rollout.num_actors * slots)
    return Calibration(
        engine=EngineModel(slots=slots, step_s=DECODE_STEP_S),
        learner=LearnerModel(iteration_s=0.0, token_s=generation_s / 2 / tokens),
        lengths=lengths,
        prompt_tokens=0,
        score_s=0.0,
        origin=(
            f"assumed: lengths lognormal with median {most / LENGTH_SHARE:,.0f} and 99th percentile {most:,}, "
            f"{DECODE_STEP_S * 1e3:g} ms a step, training in half the time of generation; --from RUN fits them to a run"
        ),
    )


def unit_of(config: Config) -> int:
    """Tokens that one simulated token stands for."""
    return max(1, config.data.max_tokens // UNITS)


def configured(config: Config, models: Calibration, *, iterations: int) -> SimulationSettings:
    """The simulation of a configuration; its tokens are units."""
    unit = unit_of(config)
    scheduler = SchedulerSettings.of(config)
    segment = scheduler.tokens_per_segment
    engine, learner = models.engine, models.learner
    return SimulationSettings(
        scheduler=replace(
            scheduler,
            tokens_per_iteration=max(1, scheduler.tokens_per_iteration // unit),
            least_tokens=max(1, scheduler.least_tokens // unit),
            tokens_per_segment=None if segment is None else max(1, segment // unit),
        ),
        max_staleness=config.scheduler.max_staleness,
        window=config.scheduler.window,
        iterations=iterations,
        group_size=config.data.group_size,
        max_tokens=-(-config.data.max_tokens // unit),
        lengths=_in_units(models.lengths, unit),
        engine=replace(
            engine,
            slots=config.rollout.slots or engine.slots,
            step_s=engine.step_s * unit,
            sequence_s=engine.sequence_s * unit,
            context_s=engine.context_s * unit * unit,
            prefill_s=engine.prefill_s * unit,
        ),
        learner=replace(learner, token_s=learner.token_s * unit),
        actors=config.rollout.num_actors,
        prompt_tokens=max(1, round(models.prompt_tokens / unit)),
        score_s=models.score_s,
        grant_tokens=max(1, grant_tokens(config) // unit),
        refill_limit=config.scheduler.refill_limit if config.scheduler.refill else None,
        no_signal_share=models.no_signal_share if config.scheduler.refill else 0.0,
        seed=config.run.seed,
    )


def variants(given: SimulationSettings, *, in_turn: bool = False) -> Iterator[tuple[str, SimulationSettings]]:
    """The configuration, then the modes of the field on the same job and machine, then no bound at all.

    Where engines and learner have the devices `in_turn`, nothing can run ahead.
    """
    scheduler = replace(given.scheduler, extra_groups=0, versions=None, policy=None)
    whole = scheduler.groups_per_iteration * given.group_size * given.max_tokens
    plenty = replace(scheduler, tokens_per_segment=None, tokens_per_iteration=whole * (FAR_AHEAD + 1), iteration_s=None)
    yield AS_CONFIGURED, given
    yield "synchronous", replace(given, scheduler=replace(plenty, lookahead=0), max_staleness=0, window=None)
    segment = max(1, given.max_tokens // K15_SEGMENTS)
    k15 = replace(scheduler, lookahead=0, tokens_per_segment=segment)
    yield "Kimi k1.5", replace(given, scheduler=k15, max_staleness=None, window=None)
    april = replace(plenty, lookahead=0, extra_groups=max(1, scheduler.groups_per_iteration // 2))
    yield "APRIL", replace(given, scheduler=april, max_staleness=None, window=None)
    if in_turn:
        return
    ahead, versions = max(scheduler.lookahead, 1), given.scheduler.versions or DORA_VERSIONS
    dora = replace(plenty, lookahead=ahead, versions=versions)
    yield "DORA", replace(given, scheduler=dora, max_staleness=_at_least(given.max_staleness, ahead, versions - 1))
    for lookahead in (1, 2, 3, 4):
        bound = _at_least(given.max_staleness, lookahead)
        yield (
            f"lookahead {lookahead}",
            replace(given, scheduler=replace(plenty, lookahead=lookahead), max_staleness=bound),
        )
    for lookahead, bound in ((2, 6), (3, 8)):  # for answers that take several iterations
        if given.max_staleness is not None and given.max_staleness < bound:
            wide = replace(given, scheduler=replace(plenty, lookahead=lookahead), max_staleness=bound)
            yield f"lookahead {lookahead}, age {bound}", wide
    yield UNBOUNDED, replace(given, scheduler=replace(plenty, lookahead=FAR_AHEAD), max_staleness=None, window=None)


def splits(given: SimulationSettings, config: Config) -> Iterator[tuple[str, SimulationSettings]]:
    """The same processors divided otherwise; training takes time in inverse proportion to its ranks.

    None where engines and ranks share devices: there is nothing to divide.
    """
    width, now = config.rollout.tensor_parallel, config.learner.num_ranks
    total, gpus = given.actors * width + now, planned_gpus(config)
    if config.cluster.colocate or (gpus is not None and gpus.count < total):
        return
    for actors in sorted({max(1, total * part // (8 * width)) for part in range(1, 8)} - {given.actors}):
        ranks = ranks_beside(actors, config)
        if ranks > 0:
            scale = now / ranks
            learner = replace(
                given.learner, iteration_s=given.learner.iteration_s * scale, token_s=given.learner.token_s * scale
            )
            yield f"{actors} + {ranks}", replace(given, actors=actors, learner=learner)


def ranks_beside(actors: int, config: Config) -> int:
    """Learner ranks on the processors that so many rollout actors leave; none may be too many for a whole replica."""
    width, learner = config.rollout.tensor_parallel, config.learner
    left = learner.num_ranks + (config.rollout.num_actors - actors) * width
    return max(left - left % math.lcm(learner.replicas, learner.context_parallel), 0)


def shrunk(given: SimulationSettings, *, trajectories: int) -> tuple[SimulationSettings, int]:
    """The same job on a part of its machine, so that a claim has about so many trajectories, and what part it is.

    Iterations take as long as the whole one's; a tail is a little shorter, as the longest of fewer answers is.
    """
    scheduler, groups = given.scheduler, given.scheduler.groups_per_iteration
    part = max(1, min(groups, groups * given.group_size // trajectories))
    actors = max(1, round(given.actors / part))
    slots = max(1, round(given.actors * given.engine.slots / part / actors))
    engine, learner = given.engine, given.learner
    smaller = replace(
        given,
        scheduler=replace(
            scheduler,
            groups_per_iteration=groups // part,
            tokens_per_iteration=max(1, scheduler.tokens_per_iteration // part),
            least_tokens=max(1, scheduler.least_tokens // part),
            extra_groups=-(-scheduler.extra_groups // part),
        ),
        window=None if given.window is None else max(groups // part, given.window // part),
        engine=replace(
            engine,
            slots=slots,
            sequence_s=engine.sequence_s * engine.slots / slots,
            context_s=engine.context_s * engine.slots / slots,
        ),
        learner=replace(learner, token_s=learner.token_s * part),
        actors=actors,
    )
    return smaller, part


def _at_least(bound: int | None, *least: int) -> int | None:
    return None if bound is None else max(bound, *least)


def _in_units(lengths: Lengths, unit: int) -> Lengths:
    if isinstance(lengths, RecordedLengths):
        return RecordedLengths(groups=[[-(-length // unit) for length in group] for group in lengths.groups])
    assert isinstance(lengths, LognormalLengths)
    return replace(lengths, median=lengths.median / unit, p99=lengths.p99 / unit)
