"""Numbers of one claim, of spans, and the summary that a run prints at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pmdflow.metrics.history import History, Record
from pmdflow.metrics.intervals import UNRECORDED, clip, covered_s, is_bubble, overlap_s, seconds_by_name, union
from pmdflow.types import Float64, Int64, Mask, Stop, TrainBatch

OUTSIDE_SUM = ("prompt", "observed", "reprefill", "eval")
"""Keys of the ledger that count other tokens than generated ones of training."""
_ROLES = ("rollout", "learner", "reward", "controller", "store")


def batch_metrics(batch: TrainBatch) -> dict[str, Any]:
    """Compute the reward, trajectory and staleness keys of an iteration's metrics.

    Lengths count generated tokens. Staleness runs over the tokens that have a gradient; `masked_share` is
    generated tokens without one over generated tokens, `masked_share_by_decile` the same by decile of generated
    length, shortest first (None where a decile is empty).
    """
    count = len(batch.rewards)
    owner = np.repeat(np.arange(count), np.diff(batch.cu_seqlens))
    generated = (batch.mask & Mask.GENERATED) != 0
    trained = generated & ((batch.mask & Mask.TRAINED) != 0)
    lengths = np.bincount(owner[generated], minlength=count)
    untrained = np.bincount(owner[generated & ~trained], minlength=count)
    staleness = batch.version - batch.versions[trained].astype(np.int64)
    ages, tokens = np.unique(staleness, return_counts=True)
    return {
        "reward/mean": _mean(batch.rewards),
        "reward/std": float(np.std(batch.rewards)) if count else None,
        "trajectory/length_mean": _mean(lengths),
        "trajectory/length_p90": float(np.percentile(lengths, 90)) if count else None,
        "trajectory/multi_version_share": _mean(_multi_version(batch, owner, generated)),
        "trajectory/stop_share": _mean(batch.stops == Stop.STOP),
        "trajectory/length_share": _mean(batch.stops == Stop.LENGTH),
        "staleness/mean": _mean(staleness),
        "staleness/max": int(staleness.max()) if len(staleness) else None,
        "staleness/tokens": {str(age): int(number) for age, number in zip(ages, tokens, strict=True)},
        "staleness/masked_share": _share(untrained.sum(), lengths.sum()),
        "staleness/masked_share_by_decile": _by_decile(lengths, untrained),
    }


def busy_share(spans: Iterable[Mapping[str, Any]], actor_prefix: str, start: float, end: float) -> float | None:
    """Share of `start` to `end` that spans other than `wait_*` cover, averaged over the actors of the prefix.

    None without such an actor or without time.
    """
    working: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for span in spans:
        if str(span["actor"]).startswith(actor_prefix):
            working[span["actor"]].extend([] if is_bubble(span["name"]) else [span])
    if not working or end <= start:
        return None
    return float(np.mean([covered_s(union(clip(own, start, end))) for own in working.values()]) / (end - start))


def ledger_of(record: Mapping[str, Any]) -> dict[str, int]:
    """The `ledger/` keys of a metrics record, without the prefix."""
    return {key.removeprefix("ledger/"): int(n) for key, n in record.items() if key.startswith("ledger/")}


def ledger_gap(ledger: Mapping[str, int]) -> int:
    """Generated tokens minus the sum of their places: 0 when the books are right."""
    return ledger.get("generated", 0) - sum(n for key, n in ledger.items() if key not in ("generated", *OUTSIDE_SUM))


def ledger_places(ledger: Mapping[str, int]) -> dict[str, int]:
    """The places of generated tokens that are in use."""
    return {key: n for key, n in ledger.items() if key not in ("generated", *OUTSIDE_SUM) and n}


def latest_ledger(history: History) -> dict[str, int]:
    """The newest ledger of a run; empty if none was recorded."""
    candidates = [*list(history.iterations.values())[-1:], *history.samples[-1:]]
    records = [record for record in candidates if "ledger/generated" in record]
    return ledger_of(max(records, key=lambda record: record["time"])) if records else {}


def staleness_tokens(iterations: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Tokens that had a gradient, by staleness, summed over iterations; ascending."""
    total: defaultdict[int, int] = defaultdict(int)
    for record in iterations:
        for age, tokens in (record.get("staleness/tokens") or {}).items():
            total[int(age)] += int(tokens)
    return dict(sorted(total.items()))


def overlap_share(spans: Iterable[Mapping[str, Any]]) -> float | None:
    """Share of the time in learner steps during which some rollout actor was generating."""
    steps, generating = [], []
    for span in spans:
        if span["name"] == "step" and str(span["actor"]).startswith("learner"):
            steps.append((span["start"], span["end"]))
        elif span["name"] == "generate":
            generating.append((span["start"], span["end"]))
    training = union(steps)
    return overlap_s(training, union(generating)) / covered_s(training) if len(training) else None


def read_config(run_dir: Path) -> dict[str, Any]:
    """The run's `config.yaml` as plain data; empty if it is missing or unreadable."""
    try:
        loaded = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def render_summary(run_dir: str | Path) -> str:
    """The final summary of a run, from its files alone; for a run in any state."""
    directory = Path(run_dir)
    history = History(directory)
    history.update()
    iterations = [history.iterations[number] for number in sorted(history.iterations)]
    if not iterations:
        return f"{directory}: no iteration was finished"
    limit = (read_config(directory).get("scheduler") or {}).get("max_staleness")
    lines = [
        f"summary of {directory}",
        *_learning_lines(history, iterations),
        *_ledger_lines(latest_ledger(history)),
        *_staleness_lines(iterations, limit),
        *_time_lines(list(history.spans), iterations[-1]["time"]),
    ]
    return "\n".join(lines)


def _learning_lines(history: History, iterations: Sequence[Record]) -> list[str]:
    first, last = iterations[0], iterations[-1]
    seconds = sum(record.get("time/iteration_s") or 0.0 for record in iterations)
    generated = latest_ledger(history).get("generated", 0)
    rate = f", {generated / seconds:,.0f} generated tokens/s" if seconds else ""
    numbers = f"iteration {first['iteration']} -> {last['iteration']}"
    reward = [_text(record.get("reward/mean")) for record in (first, last)]
    length = [_text(record.get("trajectory/length_mean"), 1) for record in (first, last)]
    return [
        *_held_out_lines(history.evals),
        f"  train reward      {reward[0]} -> {reward[1]} ({numbers})",
        f"  response length   {length[0]} -> {length[1]} tokens",
        f"  iterations        {len(iterations)} in {duration(seconds)}{rate}",
    ]


def _held_out_lines(evals: Mapping[int, Record]) -> list[str]:
    if not evals:
        return []
    early, late = evals[min(evals)], evals[max(evals)]
    first = f"{_text(early.get('eval/reward_mean'))} (v{early.get('eval/first_version')})"
    last = f"{_text(late.get('eval/reward_mean'))} (v{late.get('eval/last_version')})"
    return [f"  held-out reward   {first} -> {last}, {late.get('eval/prompts')} prompts"]


def _ledger_lines(ledger: Mapping[str, int]) -> list[str]:
    if not ledger:
        return ["  ledger            not recorded"]
    generated = ledger["generated"]
    gap = ledger_gap(ledger)
    lines = ["  ledger (generated tokens)"]
    lines += [f"    {key:<24}{n:>14,}  {_percent(_share(n, generated))}" for key, n in ledger_places(ledger).items()]
    check = "sums match" if gap == 0 else f"SUM DIFFERS by {gap:,}"
    lines.append(f"    {'generated':<24}{generated:>14,}  {check}")
    outside = ", ".join(f"{key} {ledger[key]:,}" for key in OUTSIDE_SUM if key in ledger)
    return [*lines, f"    outside the sum: {outside}"] if outside else lines


def _staleness_lines(iterations: Sequence[Record], limit: int | None) -> list[str]:
    tokens = staleness_tokens(iterations)
    total = sum(tokens.values())
    over = sum(n for age, n in tokens.items() if limit is not None and age > limit)
    shares = [shares for record in iterations if (shares := record.get("staleness/masked_share_by_decile"))]
    masked = " ".join(_percent(_nan_mean(column)).strip() for column in zip(*shares, strict=True))
    multiple = _percent(_nan_mean(_column(iterations, "trajectory/multi_version_share"))).strip()
    lines = [
        f"  trajectories of 2 or more versions  {multiple}",
        f"  staleness of tokens with a gradient (limit: {'none' if limit is None else limit})",
    ]
    lines += [
        f"    {age:>3} {n:>14,}  {_percent(n / total)} {'#' * round(40 * n / total)}" for age, n in tokens.items()
    ]
    verdict = "no limit is set" if limit is None else f"{over:,} tokens over the limit"
    masked_all = _percent(_nan_mean(_column(iterations, "staleness/masked_share"))).strip()
    return [
        *lines,
        f"    {verdict}",
        f"  masked generated tokens  {masked_all}; by length decile, shortest first: {masked or 'not recorded'}",
    ]


def _time_lines(spans: Sequence[Record], end: float) -> list[str]:
    generating = [span["start"] for span in spans if span["name"] == "generate"]
    if not generating:
        return ["  actor time        no generation was recorded"]
    start = min(generating)
    lines = [
        f"  rollout busy after start-up            {_percent(busy_share(spans, 'rollout', start, end)).strip()}",
        f"  generation during learner steps        {_percent(overlap_share(spans)).strip()} of step time",
        f"  actor time, {duration(end - start)} after start-up",
    ]
    for role in _ROLES:
        by_actor: defaultdict[str, list[Record]] = defaultdict(list)
        for span in spans:
            if str(span["actor"]).startswith(role):
                by_actor[span["actor"]].append(span)
        if by_actor:
            lines.append(f"    {role:<12}{_role_time(by_actor.values(), start, end)}")
    return lines


def _role_time(actors: Iterable[Sequence[Record]], start: float, end: float) -> str:
    total: defaultdict[str, float] = defaultdict(float)
    for spans in actors:
        for name, seconds in seconds_by_name(spans, start, end).items():
            total[name] += seconds
    whole = sum(total.values())
    order = sorted(total, key=lambda name: (name == UNRECORDED, is_bubble(name), -total[name]))
    return ", ".join(f"{name} {_percent(_share(total[name], whole)).strip()}" for name in order)


def duration(seconds: float) -> str:
    """Seconds as words, such as `4 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _multi_version(batch: TrainBatch, owner: Int64, generated: np.ndarray[Any, np.dtype[np.bool_]]) -> Any:
    newest = np.full(len(batch.rewards), np.iinfo(np.int32).min, np.int64)
    oldest = np.full(len(batch.rewards), np.iinfo(np.int32).max, np.int64)
    np.maximum.at(newest, owner[generated], batch.versions[generated])
    np.minimum.at(oldest, owner[generated], batch.versions[generated])
    return newest > oldest


def _by_decile(lengths: Int64, untrained: Int64) -> list[float | None]:
    rank = np.empty(len(lengths), np.int64)
    rank[np.argsort(lengths, kind="stable")] = np.arange(len(lengths))
    decile = rank * 10 // max(len(lengths), 1)
    tokens = np.bincount(decile, weights=lengths, minlength=10)
    masked = np.bincount(decile, weights=untrained, minlength=10)
    return [_share(part, whole) for part, whole in zip(masked, tokens, strict=True)]


def _column(records: Iterable[Record], key: str) -> list[float | None]:
    return [record.get(key) for record in records]


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _nan_mean(values: Iterable[float | None]) -> float | None:
    known: Float64 = np.array([value for value in values if value is not None], np.float64)
    return _mean(known)


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _text(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "     -" if value is None else f"{100 * value:5.1f}%"
