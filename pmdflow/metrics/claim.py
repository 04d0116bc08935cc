"""The numbers of one claim in an iteration's metrics: rewards, lengths, staleness."""

from __future__ import annotations

from typing import Any

import numpy as np

from pmdflow.types import ClaimPlan, Int64, Mask, Stop, TrainBatch


def claim_metrics(batch: TrainBatch) -> dict[str, Any]:
    """Compute the reward, trajectory and staleness keys of an iteration's metrics.

    Lengths count generated tokens. Staleness runs over the tokens that have a gradient; `masked_share` is
    generated tokens without one over generated tokens, `masked_share_by_decile` the same by decile of generated
    length, shortest first (None where a decile is empty). The length by step is a mean over the step's trajectories.
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
        "trajectory/length_by_step": None if batch.plan is None else _by_step(batch.groups, batch.plan, lengths),
        "trajectory/multi_version_share": _mean(_multi_version(batch, owner, generated)),
        "trajectory/stop_share": _mean(batch.stops == Stop.STOP),
        "trajectory/length_share": _mean(batch.stops == Stop.LENGTH),
        "staleness/mean": _mean(staleness),
        "staleness/max": int(staleness.max()) if len(staleness) else None,
        "staleness/tokens": {str(age): int(number) for age, number in zip(ages, tokens, strict=True)},
        "staleness/masked_share": _share(untrained.sum(), lengths.sum()),
        "staleness/masked_share_by_decile": _by_decile(lengths, untrained),
    }


def _multi_version(batch: TrainBatch, owner: Int64, generated: np.ndarray[Any, np.dtype[np.bool_]]) -> Any:
    newest = np.full(len(batch.rewards), np.iinfo(np.int32).min, np.int64)
    oldest = np.full(len(batch.rewards), np.iinfo(np.int32).max, np.int64)
    np.maximum.at(newest, owner[generated], batch.versions[generated])
    np.minimum.at(oldest, owner[generated], batch.versions[generated])
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
