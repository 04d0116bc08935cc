"""The numbers of one claim in an iteration's metrics: rewards, lengths, staleness."""

from __future__ import annotations

from typing import Any

import numpy as np

from pmdflow.types import Claim, ClaimPlan, ClaimRows, Int32, Int64, Mask, Stop


def claim_metrics(claim: Claim) -> dict[str, Any]:
    """Compute the reward, trajectory and staleness keys of an iteration's metrics.

    Rewards, stops and lengths, which count generated tokens, are those of episodes. Staleness runs over the tokens that
    have a gradient; `masked_share` is generated tokens without one over generated tokens, `masked_share_by_decile` the
    same by decile of generated length, shortest first (None where a decile is empty). The length by
    step is a mean over the step's episodes.
    """
    first = claim.first_branches()
    rewards, stops, count = claim.rewards[first], claim.stops[first], len(first)
    lengths = episode_lengths(claim)
    untrained = lengths - _per_episode(claim, claim.count(Mask.TRAINED))
    trained = (claim.segment_masks & Mask.TRAINED) != 0
    staleness = staleness_of(claim, claim.segment_versions[trained])
    multiple = _multi_version(claim)
    ages, which = np.unique(staleness, return_inverse=True)
    tokens = np.zeros(len(ages), np.int64)
    np.add.at(tokens, which, claim.segment_lengths[trained])
    return {
        "reward/mean": _mean(rewards),
        "reward/std": float(np.std(rewards)) if count else None,
        "reward/signal_share": _signal_share(claim.groups[first], rewards),
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
        "staleness/masked_share_by_decile": by_decile(lengths, untrained, lengths),
    }


def staleness_of(claim: ClaimRows, versions: Int32) -> Int64:
    """Iterations that the learner had trained at a claim and the weights of `versions` had not, each >= 0.

    Args:
        claim: Where it is counted from.
        versions: Policy versions of tokens, of any shape.
    """
    first = np.array(sorted(claim.restored), np.int64)
    skips = np.array([0] + [claim.restored[version] - version for version in first.tolist()], np.int64)
    ahead, trained = (
        which + skips[np.searchsorted(first, which, side="right")] for which in (np.int64(claim.version), versions)
    )
    return np.asarray(np.maximum(ahead - trained, 0), np.int64)


def episode_lengths(claim: Claim) -> Int64:
    """Generated tokens of each episode of a claim [E]."""
    return _per_episode(claim, claim.count(Mask.GENERATED))


def by_decile(lengths: Int64, part: Any, whole: Any) -> list[float | None]:
    """Sum of `part` over that of `whole`, by decile of length, shortest first; None where a decile has nothing.

    Args:
        lengths: Generated tokens of each episode [E].
        part: A number of each [E].
        whole: A number of each [E].
    """
    rank = np.empty(len(lengths), np.int64)
    rank[np.argsort(lengths, kind="stable")] = np.arange(len(lengths))
    decile = rank * 10 // max(len(lengths), 1)
    parts, wholes = (np.bincount(decile, weights=values, minlength=10) for values in (part, whole))
    return [_share(one, other) for one, other in zip(parts, wholes, strict=True)]


def _per_episode(claim: Claim, counts: Int64) -> Int64:
    total = np.zeros(len(claim.first_branches()), np.int64)
    np.add.at(total, claim.episode_of(), counts)
    return total


def _signal_share(groups: Int64, rewards: Any) -> float | None:
    if not len(groups):
        return None
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    return _mean(np.maximum.reduceat(rewards, starts) > np.minimum.reduceat(rewards, starts))


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


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
