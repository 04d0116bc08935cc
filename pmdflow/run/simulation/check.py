"""`pmdflow check-policy`: random histories of the real store under a policy, and the shortest that breaks a rule."""

from __future__ import annotations

import random
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from pmdflow.config.imports import load_named, locate
from pmdflow.errors import PmdflowError
from pmdflow.run.policies import Decision, Policy
from pmdflow.run.scheduler import SchedulerSettings
from pmdflow.run.simulation.models import EngineModel, LearnerModel, LognormalLengths
from pmdflow.run.simulation.report import SimulationReport
from pmdflow.run.simulation.settings import NoSignalLeft, SimulationSettings
from pmdflow.run.simulation.world import Simulation
from pmdflow.types import Counts

MOST_EVENTS = 200_000
"""A history of so few iterations that has as many events does not end."""
MOST_SHRINKS = 400
SHOWN = 8
"""Last decisions of a history that are shown."""
_OUTSIDE = {"generated", "prompt", "observed", "reprefill", "eval", "overdraft"}
_UNFINISHED = ("partial_leased", "partial_idle", "unscored", "waiting_group", "ready", "claimed")
SIMPLEST = SimulationSettings(
    scheduler=SchedulerSettings(groups_per_iteration=1, tokens_per_iteration=300, tokens_per_segment=None, lookahead=0),
    max_staleness=None,
    iterations=1,
    group_size=1,
    max_tokens=1,
    lengths=LognormalLengths(median=1.0, p99=1.1),
    engine=EngineModel(slots=1, step_s=0.5),
    learner=LearnerModel(iteration_s=0.0),
    drain=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A history that broke a rule, made as short as it could be."""

    problem: str
    settings: SimulationSettings
    decisions: tuple[str, ...]
    """The last ones, in words."""

    def __str__(self) -> str:
        """The rule, the history, and what the policy said in it."""
        lines = [
            self.problem,
            "in this history:",
            *(f"  {name} = {value}" for name, value in _differences(self.settings)),
        ]
        return "\n".join([*lines, "what the policy said, the last times:", *(f"  {said}" for said in self.decisions)])


def check_command(path: str, *, examples: int, seed: int) -> str:
    """Check the policy that an import path names; what was found, in words.

    Raises:
        PmdflowError: it breaks a rule, or cannot be imported; the message has the shortest history.
    """
    try:
        policy = load_named(locate(path, [Path()]))
    except (ImportError, AttributeError) as error:
        raise PmdflowError(f"{path} cannot be imported: {error}") from error
    failure = check_policy(policy, examples=examples, seed=seed)
    if failure is not None:
        raise PmdflowError(f"{path}: {failure}")
    return f"{path}: {examples} histories keep every bound and end"


def check_policy(policy: Policy, *, examples: int, seed: int = 0) -> Failure | None:
    """Run random histories under a policy; the shortest that breaks a rule, or None.

    The rules: no version's token budget is overspent; no token above the bound on age has a gradient; no group is
    passed by more than the window allows, which bounds age too; with one version a trajectory none is of two, and no
    more versions are in flight than allowed; every token has one place; workers may be lost anywhere, and scoring may
    fail; every iteration is trained, and whatever was admitted is trained or evicted in the end, unless nothing has a
    signal and the refilling ends the run.

    Example:
        >>> from pmdflow.run.policies import asynchronous
        >>> check_policy(asynchronous, examples=3) is None
        True
    """
    for example in range(examples):
        settings = _draw(random.Random(f"{seed}/{example}"))
        settings = replace(settings, scheduler=replace(settings.scheduler, policy=policy))
        if _broken(settings) is not None:
            return _shortest(settings)
    return None


def _draw_scheduler(rng: random.Random, *, lookahead: int, groups: int) -> SchedulerSettings:
    versions = rng.choice([None, rng.randint(2, 4)]) if lookahead else None
    return SchedulerSettings(
        groups_per_iteration=groups,
        tokens_per_iteration=rng.randint(1, 300),
        tokens_per_segment=None if versions else rng.choice([None, rng.randint(1, 40)]),
        lookahead=lookahead,
        extra_groups=0 if lookahead else rng.choice([0, rng.randint(1, 6)]),
        versions=versions,
        iteration_s=rng.choice([None, rng.uniform(0.01, 50.0)]),
        least_tokens=rng.randint(1, 20),
    )


def _draw(rng: random.Random) -> SimulationSettings:
    """A random workload, small enough to be run thousands of times."""
    lookahead, groups, median = rng.randint(0, 3), rng.randint(1, 4), rng.uniform(1.0, 60.0)
    scheduler = _draw_scheduler(rng, lookahead=lookahead, groups=groups)
    staleness = rng.randint(max(lookahead, (scheduler.versions or 1) - 1), lookahead + 3)
    return SimulationSettings(
        scheduler=scheduler,
        max_staleness=rng.choice([None, staleness]),
        window=rng.choice([None, rng.randint(groups, 3 * groups)]),
        iterations=rng.randint(1, 4),
        group_size=rng.randint(1, 4),
        max_tokens=rng.randint(1, 80),
        lengths=LognormalLengths(median=median, p99=median * rng.uniform(1.1, 20.0)),
        engine=EngineModel(
            slots=rng.randint(1, 8),
            step_s=rng.choice([0.0, 0.01, 0.5]),
            context_s=rng.choice([0.0, 0.01]),
            prefill_s=rng.choice([0.0, 0.1]),
            apply_s=rng.choice([0.0, 1.0]),
        ),
        learner=LearnerModel(
            iteration_s=rng.choice([0.0, 3.0]), token_s=rng.choice([0.0, 0.01]), publish_s=rng.choice([0.0, 1.0])
        ),
        actors=rng.randint(1, 4),
        score_s=rng.choice([0.0, 0.7]),
        grant_tokens=rng.choice([1, 7, 64]),
        lost_share=rng.choice([0.0, 0.0, 0.02, 0.1]),
        infra_failure_share=rng.choice([0.0, 0.0, 0.2]),
        refill_limit=rng.choice([None, rng.randint(1, 3)]),
        no_signal_share=rng.choice([0.0, 0.5, 1.0]),
        drain=True,
        seed=rng.randrange(1000),
    )


def _broken(settings: SimulationSettings) -> str | None:
    """Run a history; the rule that it breaks, None if it keeps all."""
    try:
        report = Simulation(settings).run(max_events=MOST_EVENTS)
    except NoSignalLeft:
        return None if settings.refill_limit is not None else "a run that refills nothing ended for want of a signal"
    except RuntimeError as error:
        return f"it does not end: {error}"
    except PmdflowError as error:
        return str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"it raised {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return next(_breaches(settings, report), None)


def _breaches(settings: SimulationSettings, report: SimulationReport) -> Iterator[str]:
    scheduler, ledger = settings.scheduler, report.ledger
    stalest = max(iteration.staleness_max for iteration in report.iterations)
    if len(report.iterations) < settings.iterations:
        yield f"{len(report.iterations)} of {settings.iterations} iterations were trained"
    if report.overspent_tokens > 0 or ledger["overdraft"] > 0:
        yield f"a token budget is overspent by {max(report.overspent_tokens, ledger['overdraft'])}"
    if settings.max_staleness is not None and stalest > settings.max_staleness:
        yield f"a token {stalest} iterations old has a gradient, max_staleness is {settings.max_staleness}"
    if settings.window is not None:
        passed = max(iteration.passed for iteration in report.iterations)
        if passed >= settings.window:
            yield f"a group was passed by {passed} younger ones, the window has {settings.window} places"
        ahead = -(-(settings.window - 1 + report.max_groups_untrained) // scheduler.groups_per_iteration) - 1
        if not report.short_claims and stalest > ahead:
            yield f"a trained token is {stalest} iterations old, the window bounds it by {ahead}"
    if settings.one_version and report.mixed_version:
        yield f"{report.mixed_version} trajectories are of more than one version"
    if scheduler.versions is not None and report.max_versions > scheduler.versions:
        yield f"{report.max_versions} versions were in flight, scheduler.versions is {scheduler.versions}"
    places = sum(tokens for place, tokens in ledger.items() if place not in _OUTSIDE)
    if ledger["generated"] != places:
        yield f"{ledger['generated']} tokens were generated, {places} have a place"
    if ledger["trained"] != sum(iteration.trained for iteration in report.iterations):
        yield "the ledger's trained tokens are not those of the claims"
    left = {place: ledger[place] for place in _UNFINISHED if ledger[place]}
    if report.groups_left or left:
        yield f"{report.groups_left} admitted groups are neither trained nor evicted in the end; tokens: {left}"
    if report.busy_s + sum(report.waits_s.values()) > report.seconds * settings.actors + 1e-6:
        yield "the rollout actors' seconds are more than there were"


def _shortest(settings: SimulationSettings) -> Failure:
    """Simplify what can be simplified while a rule is broken."""
    runs, changed = 0, True
    while changed and runs < MOST_SHRINKS:
        changed = False
        for simpler in _simpler(settings, SIMPLEST):
            if not _is_possible(simpler):
                continue
            runs += 1
            if _broken(simpler) is not None:
                settings, changed = simpler, True
                break
    said: deque[str] = deque(maxlen=SHOWN)
    policy = settings.scheduler.policy
    assert policy is not None

    @wraps(policy)
    def heard(scheduler: SchedulerSettings, counts: Counts) -> Decision:
        decision = policy(scheduler, counts)
        seen = f"version {counts.version}, {counts.groups_untrained} groups untrained, {counts.groups_ready} ready"
        said.append(f"{seen}, {counts.tokens_spent} of {counts.tokens_budget} tokens spent: {decision}")
        return decision

    problem = _broken(replace(settings, scheduler=replace(settings.scheduler, policy=heard)))
    return Failure(problem=problem or "a rule is broken", settings=settings, decisions=tuple(said))


def _is_possible(settings: SimulationSettings) -> bool:
    """Whether a configuration may say so; see `pmdflow.config.combinations`."""
    scheduler = settings.scheduler
    least = max(scheduler.lookahead, (scheduler.versions or 1) - 1)
    return (
        (scheduler.versions is None or (scheduler.versions >= 2 and scheduler.lookahead > 0))
        and (settings.max_staleness is None or settings.max_staleness >= least)
        and (settings.window is None or settings.window >= scheduler.groups_per_iteration)
    )


def _simpler(value: Any, simplest: Any) -> Iterator[Any]:
    """The same with one field that is simplest, or half as far from that."""
    for field in fields(value):
        own, least = getattr(value, field.name), getattr(simplest, field.name)
        if field.name == "policy" or own == least:
            continue
        if is_dataclass(own):
            yield from (replace(value, **{field.name: inner}) for inner in _simpler(own, least))
            continue
        yield replace(value, **{field.name: least})
        if isinstance(own, int) and isinstance(least, int) and abs(own - least) > 1:
            yield replace(value, **{field.name: (own + least) // 2})


def _differences(value: Any, simplest: Any = SIMPLEST, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in fields(value):
        own, least = getattr(value, field.name), getattr(simplest, field.name)
        if is_dataclass(own):
            yield from _differences(own, least, f"{field.name}.")
        elif own != least and field.name != "policy":
            yield f"{prefix}{field.name}", own
