"""The labelled numbers on top of the run page: of this moment while a run lives, of the whole run afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from pmdflow.metrics.history import Record
from pmdflow.metrics.text import duration, number, percent

Tiles = list[tuple[str, str]]
"""Label and value, most important first."""


def of_now(iterations: Sequence[Record], evals: Sequence[Record], sample: Record, *, planned: int | None) -> Tiles:
    """The newest iteration, evaluation and second."""
    last = iterations[-1] if iterations else {}
    newest = evals[-1] if evals else {}
    rate = sample.get("rollout/tokens_per_s", last.get("rollout/tokens_per_s"))
    return [
        ("iteration", _of(last.get("iteration", 0), planned)),
        ("policy version", number(sample.get("scheduler/version", last.get("version")), 0)),
        ("train reward", number(last.get("reward/mean"), 3)),
        ("held-out reward", number(newest.get("eval/reward_mean"), 3)),
        *_not_scored(evals[-1:]),
        ("length, tokens", number(last.get("trajectory/length_mean"), 1)),
        ("tokens/s", number(rate, 0)),
        ("rollout busy", percent(last.get("rollout/busy_share"))),
        ("2+ versions", percent(last.get("trajectory/multi_version_share"))),
        ("masked tokens", percent(last.get("staleness/masked_share"))),
        ("groups ready", number(sample.get("store/groups_ready"), 0)),
    ]


def of_run(
    iterations: Sequence[Record], evals: Sequence[Record], ledger: Mapping[str, int], *, planned: int | None
) -> Tiles:
    """All that a run has done: totals, means over iterations, and first to last; as its printed summary."""
    seconds = sum(record.get("time/iteration_s") or 0.0 for record in iterations)
    generated = ledger.get("generated")
    rate = generated / seconds if generated is not None and seconds else None
    return [
        ("iterations", _of(len(iterations), planned)),
        ("time", duration(seconds)),
        ("train reward", _first_to_last(iterations, "reward/mean", 3)),
        ("held-out reward", _first_to_last(evals, "eval/reward_mean", 3)),
        *_not_scored(evals),
        ("length, tokens", _first_to_last(iterations, "trajectory/length_mean", 1)),
        ("tokens generated", number(generated, 0)),
        ("tokens/s", number(rate, 0)),
        ("rollout busy", percent(_mean(iterations, "rollout/busy_share"))),
        ("2+ versions", percent(_mean(iterations, "trajectory/multi_version_share"))),
        ("masked tokens", percent(_mean(iterations, "staleness/masked_share"))),
    ]


def _of(done: int, planned: int | None) -> str:
    return f"{done} / {'?' if planned is None else planned}"


def _not_scored(evals: Iterable[Record]) -> Tiles:
    """A tile if attempts of these held-out evaluations were not scored: their mean is that of the others."""
    failed = sum(record.get("eval/failed") or 0 for record in evals)
    asked = sum(record.get("eval/prompts") or 0 for record in evals)
    return [("held-out not scored", f"{failed:,} of {asked:,}")] if failed else []


def _first_to_last(records: Sequence[Record], key: str, digits: int) -> str:
    ends = [*records[:1], *records[1:][-1:]]
    return " \u2192 ".join(number(record.get(key), digits) for record in ends) or number(None, digits)


def _mean(records: Iterable[Record], key: str) -> float | None:
    known = [value for record in records if (value := record.get(key)) is not None]
    return fmean(known) if known else None
