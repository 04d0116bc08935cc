"""The numbers of one claim in an iteration's metrics: rewards, lengths, staleness."""

from __future__ import annotations

from typing import Any

import numpy as np

from pmdflow.types import Claim, ClaimPlan, Int64, Mask, Stop


def claim_metrics(claim: Claim) -> dict[str, Any]:
    """Compute the reward, trajectory and staleness keys of an iteration's metrics.

    Rewards, stops and lengths, which count generated tokens, are those of episodes. Staleness runs over the tokens that
    have a gradient; `masked_share` is generated tokens without one over generated tokens, `masked_share_by_decile` the
    same by decile of generated length, shortest first (None where a decile is empty). The length by
    step is a mean over the step's episodes.
    """
    first = claim.first_branches()
    rewards, stops, count = claim.rewards[first], claim.stops[first], len(first)
    lengths = _per_episode(claim, claim.count(Mask.GENERATED))
    untrained = lengths - _per_episode(claim, claim.count(Mask.TRAINED))
    trained = (claim.segment_masks & Mask.TRAINED) != 0
    staleness = claim.version - claim.segment_versions[trained].astype(np.int64)
    multiple = _multi_version(claim)
    ages, which = np.unique(staleness, return_inverse=True)
    tokens = np.zeros(len(ages), np.int64)
    np.add.at(tokens, which, claim.segment_lengths[trained])
    return {
        "reward/mean": _mean(rewards),
        "reward/std": float(np.std(rewards)) if count else None,
        "trajectory/length_mean": _mean(lengths),
        "trajectory/length_p90": float(np.percentile(lengths, 90)) if count else None,
        "trajectory/length_by_step": None if claim.plan is None else _by_step(claim.groups[first], claim.plan, lengths),
        "trajectory/multi_version_share": _mean(multiple),
        "trajectory/mixed_version": int(np.sum(multiple)),
        "trajectory/stop_share": _mean(stops == Stop.STOP),
        "trajectory/length_share": _mean(stops == Stop.LENGTH),
        "staleness/mean": _share((ages * tokens).sum(), tokens.sum()),
        "staleness/max": int(ages.max()) if len(ages) else None,
        "staleness/tokens": {str(age): int(number) for age, number in zip(ages, tokens, strict=True)},
        "staleness/masked_share": _share(untrained.sum(), lengths.sum()),
        "staleness/masked_share_by_decile": _by_decile(lengths, untrained),
    }


def _per_episode(claim: Claim, counts: Int64) -> Int64:
    total = np.zeros(len(claim.first_branches()), np.int64)
    np.add.at(total, claim.episode_of(), counts)
    return total


def _multi_version(claim: Claim) -> Any:
    generated = (claim.segment_masks & Mask.GENERATED) != 0
    owners, versions = claim.episode_of()[claim.segment_owners[generated]], claim.segment_versions[generated]
    newest = np.full(len(claim.first_branches()), np.iinfo(np.int32).min, np.int64)
    oldest = np.full(len(newest), np.iinfo(np.int32).max, np.int64)
    np.maximum.at(newest, owners, versions)
    np.minimum.at(oldest, owners, versions)
    return newest > oldest


def _by_step(groups: Int64, plan: ClaimPlan, lengths: Int64) -> list[float | None]:
    group = np.cumsum(np.diff(groups, prepend=groups[:1]) != 0)
    step = plan.steps[group]
    return [_mean(lengths[step == number]) for number in range(plan.num_steps)]


def _by_decile(lengths: Int64, untrained: Int64) -> list[float | None]:
    rank = np.empty(len(lengths), np.int64)
    rank[np.argsort(lengths, kind="stable")] = np.arange(len(lengths))
    decile = rank * 10 // max(len(lengths), 1)
    tokens = np.bincount(decile, weights=lengths, minlength=10)
    masked = np.bincount(decile, weights=untrained, minlength=10)
    return [_share(part, whole) for part, whole in zip(masked, tokens, strict=True)]


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
