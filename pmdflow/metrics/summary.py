"""The summary that a run prints at its end and `pmdflow status` at any time, from the files of the run alone.

`status` waits for what this module imports: NumPy is not among it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from pmdflow.config.recorded import recorded_settings
from pmdflow.metrics.fairness import lag_1
from pmdflow.metrics.history import History, Record
from pmdflow.metrics.intervals import UNRECORDED, busy_share, overlap_share, seconds_by_name
from pmdflow.metrics.ledger import OUTSIDE_SUM, latest_ledger, ledger_gap, ledger_places
from pmdflow.metrics.signal import no_signal
from pmdflow.metrics.spans import is_bubble
from pmdflow.metrics.text import duration, number, percent

_ROLES = ("rollout", "learner", "reward", "controller", "store")


def render_summary(run_dir: str | Path) -> str:
    """The final summary of a run, from its files alone; for a run in any state."""
    directory = Path(run_dir)
    history = History(directory)
    history.update()
    iterations = [history.iterations[number] for number in sorted(history.iterations)]
    if not iterations:
        return f"{directory}: no iteration was finished"
    limit = (recorded_settings(directory).get("scheduler") or {}).get("max_staleness")
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
    reward = [number(record.get("reward/mean"), 3) for record in (first, last)]
    length = [number(record.get("trajectory/length_mean"), 1) for record in (first, last)]
    return [
        *_held_out_lines("held-out reward", "eval/", history.evals),
        *(
            line
            for name, rounds in history.eval_sets.items()
            for line in _held_out_lines(name, f"eval/{name}/", rounds)
        ),
        f"  train reward      {reward[0]} -> {reward[1]} ({numbers})",
        *([f"  {warning}"] if (warning := no_signal(iterations)) else []),
        f"  response length   {length[0]} -> {length[1]} tokens",
        *_fairness_lines(iterations),
        *_order_lines(iterations),
        f"  iterations        {len(iterations)} in {duration(seconds)}{rate}",
    ]


def _fairness_lines(iterations: Sequence[Record]) -> list[str]:
    """Whether batches alternate, and whether a step gets longer answers than another."""
    lengths = [length for record in iterations if (length := record.get("trajectory/length_mean")) is not None]
    correlation = lag_1(lengths)
    by_step = [steps for record in iterations if (steps := record.get("trajectory/length_by_step"))]
    if correlation is None or not by_step:
        return []
    alike = [steps for steps in by_step if len(steps) == len(by_step[-1])]  # a resume may have changed their number
    steps = " / ".join(number(_mean(column), 1) for column in zip(*alike, strict=True))
    return [f"  batch lengths     lag-1 {number(correlation, 2)} (fair: about 0); mean by optimizer step {steps}"]


def _order_lines(iterations: Sequence[Record]) -> list[str]:
    """How long groups wait for their claim, and how many younger ones pass them."""
    deciles = [shares for record in iterations if (shares := record.get("trajectory/delay_by_decile"))]
    most = [most for record in iterations if (most := record.get("trajectory/bypasses_max")) is not None]
    if not deciles or not most:
        return []
    delays = " ".join(number(_mean(column), 1) for column in zip(*deciles, strict=True))
    return [
        f"  delay             {delays} iterations from admission to claim, by length decile, shortest first",
        f"  bypasses          at most {max(most):,} younger groups were trained before one",
    ]


def _held_out_lines(title: str, key: str, evals: Mapping[int, Record]) -> list[str]:
    if not evals:
        return []
    early, late = evals[min(evals)], evals[max(evals)]
    first, last = (
        f"{number(record.get(f'{key}reward_mean'), 3)} "
        f"(v{record.get(f'{key}version', record.get(f'{key}first_version'))})"  # the latter in older runs
        for record in (early, late)
    )
    failed = sum(record.get(f"{key}failed") or 0 for record in evals.values())
    unscored = f"; {failed:,} attempts NOT SCORED in {len(evals)} rounds" if failed else ""
    return [f"  {title:<16}  {first} -> {last}, {late.get(f'{key}prompts')} prompts{unscored}"]


def _ledger_lines(ledger: Mapping[str, int]) -> list[str]:
    if not ledger:
        return ["  ledger            not recorded"]
    generated = ledger["generated"]
    gap = ledger_gap(ledger)
    lines = ["  ledger (generated tokens)"]
    lines += [
        f"    {key:<24}{n:>14,}  {percent(_share(n, generated), 1):>6}" for key, n in ledger_places(ledger).items()
    ]
    check = "sums match" if gap == 0 else f"SUM DIFFERS by {gap:,}"
    lines.append(f"    {'generated':<24}{generated:>14,}  {check}")
    outside = ", ".join(f"{key} {ledger[key]:,}" for key in OUTSIDE_SUM if key in ledger)
    return [*lines, f"    outside the sum: {outside}"] if outside else lines


def _staleness_lines(iterations: Sequence[Record], limit: int | None) -> list[str]:
    tokens = _staleness_tokens(iterations)
    total = sum(tokens.values())
    over = sum(n for age, n in tokens.items() if limit is not None and age > limit)
    shares = [shares for record in iterations if (shares := record.get("staleness/masked_share_by_decile"))]
    masked = " ".join(percent(_mean(column), 1) for column in zip(*shares, strict=True))
    multiple = percent(_mean(_column(iterations, "trajectory/multi_version_share")), 1)
    lines = [
        f"  trajectories of 2 or more versions  {multiple}",
        f"  staleness of tokens with a gradient (limit: {'none' if limit is None else limit})",
    ]
    lines += [
        f"    {age:>3} {n:>14,}  {percent(n / total, 1):>6} {'#' * round(40 * n / total)}" for age, n in tokens.items()
    ]
    verdict = "no limit is set" if limit is None else f"{over:,} tokens over the limit"
    masked_all = percent(_mean(_column(iterations, "staleness/masked_share")), 1)
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
        f"  rollout busy after start-up            {percent(busy_share(spans, 'rollout', start, end), 1)}",
        f"  generation during learner steps        {percent(overlap_share(spans), 1)} of step time",
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
    return ", ".join(f"{name} {percent(_share(total[name], whole), 1)}" for name in order)


def _staleness_tokens(iterations: Iterable[Record]) -> dict[int, int]:
    """Tokens that had a gradient, by staleness, summed over iterations; ascending."""
    total: defaultdict[int, int] = defaultdict(int)
    for record in iterations:
        for age, tokens in (record.get("staleness/tokens") or {}).items():
            total[int(age)] += int(tokens)
    return dict(sorted(total.items()))


def _column(records: Iterable[Record], key: str) -> list[float | None]:
    return [record.get(key) for record in records]


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of what was measured."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
