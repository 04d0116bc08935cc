"""Models of engine, learner and answers fitted to what a finished or live run recorded."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pmdflow.config.load import load_run
from pmdflow.config.schema import DEFAULT_SLOTS
from pmdflow.errors import PmdflowError
from pmdflow.metrics.history import History
from pmdflow.metrics.intervals import overlap_s, union
from pmdflow.run.simulation.models import EngineModel, LearnerModel, Lengths, RecordedLengths
from pmdflow.store.archive import catalog, parts, read_table

WARM_UP = 2
"""First iterations, in which processes and caches warm up."""
FEWEST, NEWEST = 3, 50
"""Iterations after these that a fit needs, and most that it takes: a run is fitted to what it is now."""
MOST_SPANS = 200_000
ALONE, TOGETHER = 0.1, 0.9
"""Shares of a span in which the learner trains, up to and from which it counts as without and with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Models in tokens and seconds, and where they are from."""

    engine: EngineModel
    learner: LearnerModel
    lengths: Lengths
    prompt_tokens: int
    score_s: float
    origin: str
    no_signal_share: float = 0.0
    """Groups whose members were all worth the same, of those that were generated."""


def calibrate(run: Path) -> Calibration:
    """Fit the models to a run.

    Raises:
        PmdflowError: the run is too short, or of a release whose spans do not say what was generated.
    """
    history = History(run, max_spans=MOST_SPANS)
    history.update()
    numbers = sorted(history.iterations)[WARM_UP:][-NEWEST:]
    archived = parts(run)[WARM_UP:][-NEWEST:]
    if len(numbers) < FEWEST or len(archived) < FEWEST:
        raise PmdflowError(
            f"{run} has {len(numbers)} iterations after the first {WARM_UP}, {len(archived)} of them archived: too few "
            "to fit models to",
            hint=f"take a run of {WARM_UP + FEWEST} iterations or more whose checkpoints were archived",
        )
    records = [history.iterations[number] for number in numbers]
    since = records[0]["time"] - records[0]["time/iteration_s"]
    spans = [span for span in history.spans if span["start"] >= since]
    lengths, prompts = _lengths(archived)
    scored = [span["end"] - span["start"] for span in spans if span["name"] == "score"]
    return Calibration(
        engine=_engine(spans, slots=load_run(run).config.rollout.slots or DEFAULT_SLOTS, run=run),
        learner=_learner(records, {row["iteration"]: row["tokens"] for row in catalog(run)}),
        lengths=lengths,
        prompt_tokens=prompts,
        score_s=fmean(scored) if scored else 0.0,
        no_signal_share=_no_signal(records, groups=len(lengths.groups) / len(archived)),
        origin=f"fitted to iterations {numbers[0]} to {numbers[-1]} of {run}",
    )


def _engine(spans: Sequence[Mapping[str, Any]], *, slots: int, run: Path) -> EngineModel:
    """Seconds of a step, of a sequence and of a token of its context in it, and of a token that is prefilled.

    By least squares over the spans of all rollout actors.
    """
    training = union((span["start"], span["end"]) for span in spans if span["name"] in ("step", "reference"))
    rows, alone, together = [], [], []
    for span in spans:
        did, seconds = span.get("attrs", {}), span["end"] - span["start"]
        if span["name"] != "generate" or not did.get("steps") or seconds <= 0:
            continue
        context = did["steps"] * did.get("context", 0)  # runs of older releases do not say the last two
        row = (did["steps"], did["tokens"], context, did.get("prefilled", 0), seconds)
        share = overlap_s(_reaching_into(training, span), [(span["start"], span["end"])]) / seconds
        rows.append(row)
        if share <= ALONE:
            alone.append(row)
        elif share >= TOGETHER:
            together.append(row)
    if not rows:
        raise PmdflowError(
            f"the spans of {run} do not say how many tokens they generated: it is older than `pmdflow simulate`",
            hint="take a run of this release",
        )
    step_s, sequence_s, context_s, prefill_s = _fit(alone or rows)
    factor = 1.0
    if alone and together:
        expected = sum(
            step_s * steps + sequence_s * tokens + context_s * context + prefill_s * prefilled
            for steps, tokens, context, prefilled, _ in together
        )
        factor = max(sum(seconds for *_, seconds in together) / expected, 1.0)
    applied = [span["end"] - span["start"] for span in spans if span["name"] == "apply_weights"]
    return EngineModel(
        slots=slots,
        step_s=step_s,
        sequence_s=sequence_s,
        context_s=context_s,
        prefill_s=prefill_s,
        apply_s=fmean(applied) if applied else 0.0,
        training_factor=factor,
    )


def _reaching_into(intervals: Sequence[tuple[float, float]], span: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The intervals that reach into a span; both ascend, so that few are looked at."""
    first = bisect_right(intervals, span["start"], key=lambda interval: interval[1])
    last = bisect_left(intervals, span["end"], key=lambda interval: interval[0])
    return list(intervals[first:last])


def _fit(rows: Sequence[tuple[float, ...]]) -> list[float]:
    """Seconds of each of a row's numbers, none below 0, that give the rows' last ones, their seconds, best."""
    table = np.array(rows, float)
    numbers, seconds = table[:, :-1], table[:, -1]
    best, least = np.zeros(numbers.shape[1]), np.inf
    told = [column for column in range(numbers.shape[1]) if numbers[:, column].any()]
    for size in range(1, len(told) + 1):
        for chosen in map(list, combinations(told, size)):
            found, *_ = np.linalg.lstsq(numbers[:, chosen], seconds, rcond=None)
            error = float(((numbers[:, chosen] @ found - seconds) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(numbers.shape[1]), error
                best[chosen] = found
    return [float(value) for value in best]


def _learner(records: Sequence[Mapping[str, Any]], tokens: Mapping[int, int]) -> LearnerModel:
    known = [record for record in records if record["iteration"] in tokens]
    rows = [(1.0, float(tokens[record["iteration"]]), float(record["time/train_s"])) for record in known]
    iteration_s, token_s = _fit(rows)
    rest = [record["time/iteration_s"] - record["time/claim_wait_s"] - record["time/train_s"] for record in records]
    return LearnerModel(iteration_s=iteration_s, token_s=token_s, publish_s=max(fmean(rest), 0.0))


def _no_signal(records: Sequence[Mapping[str, Any]], *, groups: float) -> float:
    """Share of groups without a signal: those of the claims, and those that were evicted instead of being claimed.

    Args:
        records: Of the iterations.
        groups: Of a claim, on average.
    """
    evicted = [record.get("store/groups_no_signal", 0) for record in records]
    again = sum(max(after - before, 0) for before, after in pairwise(evicted))
    shares = [record["reward/signal_share"] for record in records if record.get("reward/signal_share") is not None]
    dull = groups * sum(1 - share for share in shares)
    share: float = (again + dull) / (again + groups * len(records))
    return share


def _lengths(archived: Sequence[Path]) -> tuple[RecordedLengths, int]:
    """Lengths of each archived group's answers, and the mean tokens of a prompt."""
    groups: list[list[int]] = []
    prompts: list[float] = []
    for path in archived:
        table = read_table(path, "trajectory")
        own = np.diff(table["token_offset"]) - table["prompt_length"]
        ends = np.cumsum(read_table(path, "group")["size"])
        groups += [part.tolist() for part in np.split(own, ends[:-1])]
        prompts.append(float(table["prompt_length"].mean()))
    return RecordedLengths(groups=groups), round(fmean(prompts))
