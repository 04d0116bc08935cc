"""A round of evaluation during a run: what is answered, and what its answers say of the one version that gave them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmdflow.config.sources import EvalSetConfig
from pmdflow.evaluate.results import pass_at_k
from pmdflow.store.answers import EvalResult
from pmdflow.types import Prompt

MOST_NAMES = 8
"""Prompts that an event names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """Prompts that are answered together: the held-out ones of `data`, or one of `eval.sets`."""

    name: str
    """Key in `eval.sets`; empty for the held-out prompts of `data`."""
    prompts: Sequence[Prompt]
    settings: EvalSetConfig | None
    """None for the held-out prompts of `data`."""

    @property
    def samples(self) -> int:
        """Attempts at each prompt."""
        return 1 if self.settings is None else self.settings.samples

    def request_prefix(self, iteration: int) -> str:
        """What the request ids of a round begin with; no other round's do."""
        return f"eval-{iteration:06d}/{self.name}/" if self.name else f"eval-{iteration:06d}-"


def failures(results: Sequence[EvalResult], given: EvaluationSet, iteration: int) -> str:
    """What a round says of attempts that could not be scored; empty without any."""
    failed = sum(result.reward is None for result in results)
    if not failed:
        return ""
    what = f"evaluation set {given.name}" if given.name else "held-out evaluation"
    rest = "its reward is the mean of the others" if failed < len(results) else "it has no reward"
    return f"{what} of iteration {iteration}: {failed} of {len(results)} attempts were not scored; {rest}"


def unfinished(prompt_ids: Sequence[str], iteration: int, *, hold_s: float) -> str:
    """What a round says of answers that were not finished while its version was kept: it has no point."""
    names = ", ".join(prompt_ids[:MOST_NAMES]) + (", ..." if len(prompt_ids) > MOST_NAMES else "")
    return (
        f"evaluation of iteration {iteration}: {len(prompt_ids)} answers were not finished within eval.hold_s "
        f"({hold_s:g} s), so it has no result; they start again in the next round: {names}"
    )


def summarize_round(
    results: Sequence[EvalResult], given: EvaluationSet, *, version: int
) -> dict[str, float | int | str | None]:
    """The `eval/*` metrics of one set of a round; those of a named set are `eval/NAME/*`.

    An attempt whose scoring failed for good has no reward: it is left out of the mean, which is None if nobody has one.
    `failed` counts them: a failure of the judge says nothing about the policy, so it is neither a 0 nor forgotten.

    Args:
        results: Every attempt at the set's prompts.
        given: The set.
        version: The policy version that gave all of them; an attempt whose environment never began has none.
    """
    of = {found for result in results for found in (result.first_version, result.last_version) if found is not None}
    assert of <= {version}, f"a round of version {version} has answers of {sorted(of)}"
    key = f"eval/{given.name}/" if given.name else "eval/"
    rewards: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if result.reward is not None:
            rewards[result.request_id].append(result.reward)
    values: dict[str, float | int | str | None] = {
        f"{key}reward_mean": float(np.mean([np.mean(own) for own in rewards.values()])) if rewards else None,
        f"{key}prompts": len(given.prompts),
        f"{key}failed": sum(result.reward is None for result in results),
        f"{key}length_mean": float(np.mean([result.length for result in results])),
        f"{key}version": version,
    }
    if given.settings is None:
        return values
    for k in given.settings.k or [1 << power for power in range(given.samples.bit_length())]:
        passes = [
            pass_at_k(attempts=len(own), passed=sum(reward >= given.settings.pass_reward for reward in own), k=k)
            for own in rewards.values()
            if len(own) >= k
        ]
        values[f"{key}pass_at_{k}"] = float(np.mean(passes)) if passes else None
    return {"eval/set": given.name, **values}
