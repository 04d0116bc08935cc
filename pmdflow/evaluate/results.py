"""What an evaluation found: estimates with 95 % intervals over prompts, the files and the table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pmdflow.evaluate.task import Sample
from pmdflow.metrics.confidence import bootstrap_mean, wilson
from pmdflow.types import Prompt


def pass_at_k(*, attempts: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k attempts passes: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: k is above the number of attempts.

    Source: arXiv:2107.03374 eq. 1.

    Example:
        >>> pass_at_k(attempts=4, passed=1, k=2)
        0.5
    """
    if not 1 <= k <= attempts:
        raise ValueError(f"pass@{k} needs at least {k} attempts and k >= 1; there are {attempts}")
    return 1.0 - math.comb(attempts - passed, k) / math.comb(attempts, k)


def summarize(results: Sequence[Sequence[Sample]], *, ks: Sequence[int], pass_reward: float) -> dict[str, Any]:
    """avg@n, and pass@k for each of `ks`, with 95 % intervals over prompts.

    Attempts that could not be scored are in neither. The interval of avg@n is a bootstrap over prompts, that of pass@k
    Wilson's with as many trials as prompts: attempts at one prompt are no independent evidence.
    """
    rewards = [[s.reward for s in samples if s.reward is not None] for samples in results]
    means = [float(np.mean(values)) for values in rewards if values]
    flat = [sample for samples in results for sample in samples]
    summary: dict[str, Any] = {
        "prompts": len(results),
        "attempts": len(flat),
        "infra_failures": sum(sample.reward is None for sample in flat),
        "first_failure": next((sample.message for sample in flat if sample.reward is None), None),
        "invalid": sum(sample.outcome == "invalid" for sample in flat),
        "environment_failures": sum(len(sample.problems) for sample in flat),
        "tokens": sum(sample.tokens for sample in flat),
        "length_mean": float(np.mean([sample.tokens for sample in flat])),
        "stops": dict(Counter(sample.stop for sample in flat)),
        "avg": _interval(float(np.mean(means)), *bootstrap_mean(means), prompts=len(means)) if means else None,
        "pass": {},
    }
    for k in ks:
        passes = [
            pass_at_k(attempts=len(values), passed=sum(value >= pass_reward for value in values), k=k)
            for values in rewards
            if len(values) >= k
        ]
        if passes:
            mean = float(np.mean(passes))
            summary["pass"][str(k)] = _interval(mean, *wilson(mean, len(passes)), prompts=len(passes))
    return summary


def _interval(mean: float, low: float, high: float, *, prompts: int) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "prompts": prompts}


def write_results(
    out: Path, prompts: Sequence[Prompt], results: Sequence[Sequence[Sample]], summary: Mapping[str, Any]
) -> None:
    """Write `samples.jsonl`, a line a prompt, and `summary.json`."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "samples.jsonl", "w", encoding="utf-8") as file:
        for prompt, samples in zip(prompts, results, strict=True):
            row = {"prompt_id": prompt.id, "prompt": prompt.text, "samples": [asdict(sample) for sample in samples]}
            file.write(json.dumps(row) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def print_table(summary: Mapping[str, Any], console: Console) -> None:
    """The summary as a table."""
    table = Table("metric", "value", "95 % interval", "prompts", title=f"{summary['checkpoint']} on {summary['task']}")
    rows = {f"avg@{summary['samples']}": summary["avg"]} | {f"pass@{k}": v for k, v in summary["pass"].items()}
    for name, value in rows.items():
        if value is not None:
            bounds = f"{value['low']:.4f} to {value['high']:.4f}"
            table.add_row(name, f"{value['mean']:.4f}", bounds, str(value["prompts"]))
    console.print(table)
    console.print(
        f"{summary['attempts']} attempts, {summary['length_mean']:.1f} tokens on average, "
        f"{summary['invalid']} invalid, {summary['tokens_per_s']:,.0f} tokens/s"
    )
    if failed := summary["infra_failures"]:
        rest = "the estimates are of the others" if failed < summary["attempts"] else "there is no estimate"
        what = f"NOT SCORED: {failed} of {summary['attempts']} attempts, so {rest}"
        console.print(f"{what}; the first: {summary['first_failure']}", style="bold", markup=False)
