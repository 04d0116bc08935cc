"""Whether rewards tell the learner anything: what is to be said, and likely causes, where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pmdflow.metrics.text import number, percent

RECENT = 3
"""Newest iterations that are looked at."""


def no_signal(iterations: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the rewards of the newest iterations, in one line; None where any group's differ.

    Args:
        iterations: `iteration` records, ascending.
    """
    recent = iterations[-RECENT:]
    if not recent:
        return None
    when = f"of the last {len(recent)} iterations" if len(recent) > 1 else "of the last iteration"
    if all(record.get("learner/filter_share") == 1 for record in recent):
        limits = "learner.keep_groups_above and keep_groups_below"
        return f"NO SIGNAL: {limits} leave out every group {when}; their mean rewards are {_values(recent)}"
    means = {record.get("reward/mean") for record in recent}
    if all(record.get("reward/std") == 0 for record in recent) and len(means) == 1:
        return f"NO SIGNAL: every reward {when} is {_values(recent)}; likely causes: {_causes(recent)}"
    if all(record.get("reward/signal_share") == 0 for record in recent):
        return (
            f"NO SIGNAL: the rewards of each group {when} are equal; likely causes: its answers are alike (a low "
            "rollout.temperature), or the reward looks at the prompt alone"
        )
    return None


def _causes(recent: Sequence[Mapping[str, Any]]) -> str:
    if recent[-1].get("reward/mean") != 0:
        return "the task is solved, or the reward function does not look at the answer"
    cut = recent[-1].get("trajectory/length_share")
    cut_off = f", {percent(cut)} of the answers are cut at data.max_tokens" if cut else ""
    return (
        "the reward function finds no answer right, it looks for another format than the model writes"
        f"{cut_off}, or the task is too hard for this model (`pmdflow dashboard` shows the answers)"
    )


def _values(recent: Sequence[Mapping[str, Any]]) -> str:
    values = [record.get("reward/mean") for record in recent]
    known = [value for value in values if value is not None]
    ends = sorted({number(value, 3) for value in (min(known), max(known))}) if known else ["unknown"]
    return " to ".join(ends)
