"""Which tokens of a claim are trained, and how much each sequence counts: group filter, veto, importance weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.advantage import keep_groups
from pmdflow.learner.batch import Bool, StepPlan
from pmdflow.learner.correction import importance_weights, sequence_weights, veto
from pmdflow.learner.layout import unpack
from pmdflow.types import Float64, TrainBatch

if TYPE_CHECKING:
    from pmdflow.learner.steps import Tensors


def filter_groups(batch: TrainBatch, trained: Bool, rewards: Float64, learner: LearnerConfig) -> Bool:
    """`trained` [T] without the tokens of groups whose mean reward the config leaves out."""
    low, high = learner.keep_groups_above, learner.keep_groups_below
    keep = keep_groups(rewards, batch.groups, low=low, high=high)
    return np.asarray(trained & np.repeat(keep, np.diff(batch.cu_seqlens)))


@dataclass(frozen=True, slots=True)
class Corrected:
    """What the correction of one step found on one rank, as sums that can be added over ranks."""

    vetoed_sequences: float = 0.0
    vetoed_tokens: float = 0.0
    weights: float = 0.0
    """Sum over trained sequences of their importance weight, before it is normalized."""
    squares: float = 0.0
    sequences: float = 0.0
    unit_weights: float = 0.0
    """Sum over what is weighted, tokens or sequences; its mean is what `importance_normalize` divides by."""
    units: float = 0.0
    capped: float = 0.0
    """Tokens or sequences whose weight is the cap."""

    def as_list(self) -> list[float]:
        """The fields in order."""
        return [getattr(self, name) for name in self.__slots__]


def correct_step(
    micros: Sequence[Tensors], old: Sequence[Tensor], learner: LearnerConfig
) -> tuple[list[Tensors], Corrected]:
    """Empty the masks of vetoed sequences and set importance weights; `old` are the learner's log-probs, log pi_i.

    Returns:
        The micro-batches with weights that are not normalized yet, and this rank's sums.
    """
    corrected, sums = [], np.zeros(len(Corrected.__slots__))
    for micro, logprobs in zip(micros, old, strict=True):
        trained = micro.trained
        if learner.veto:
            drop = veto(logprobs, micro.behavior, trained, cu_seqlens=micro.cu_seqlens)
            trained = trained & ~unpack(drop, micro.cu_seqlens)
            sums[:2] += [float(drop.sum()), float((micro.trained & ~trained).sum())]
        weights = micro.weights
        if learner.importance_weights != "none":
            own, part = _weights(logprobs, micro, trained, learner)
            weights = weights * own.to(weights)
            sums[2:] += part
        corrected.append(replace(micro, trained=trained, weights=weights))
    return corrected, Corrected(*sums.tolist())


def _weights(logprobs: Tensor, micro: Tensors, trained: Tensor, learner: LearnerConfig) -> tuple[Tensor, list[float]]:
    """The importance weight of each sequence [B], and the last six sums of `Corrected`."""
    level = "sequence" if learner.importance_weights == "sequence" else "token"
    cu = micro.cu_seqlens
    per_token = importance_weights(
        logprobs.double(),
        micro.behavior.double(),
        trained,
        level=level,  # type: ignore[arg-type]
        cap=learner.importance_cap,
        cu_seqlens=cu,
    )
    own = sequence_weights(per_token, trained, cu_seqlens=cu)
    active = sequence_weights(trained.double(), trained, cu_seqlens=cu) > 0
    units = own[active] if level == "sequence" else per_token[trained]
    return own, [
        float(own[active].sum()),
        float((own[active] ** 2).sum()),
        float(active.sum()),
        float(units.sum()),
        float(units.numel()),
        float((units >= learner.importance_cap).sum()),
    ]


def finish_step(
    plan: StepPlan, micros: Sequence[Tensors], total: Corrected, learner: LearnerConfig
) -> tuple[StepPlan, list[Tensors]]:
    """Take the vetoed out of the denominators and normalize weights; `total` is the sum over ranks."""
    left = replace(
        plan,
        num_sequences=plan.num_sequences - round(total.vetoed_sequences),
        num_tokens=plan.num_tokens - round(total.vetoed_tokens),
    )
    scale = total.units / total.unit_weights if learner.importance_normalize and total.unit_weights > 0 else 1.0
    return left, [replace(micro, weights=micro.weights * scale) for micro in micros]


def correction_metrics(totals: Sequence[Corrected], learner: LearnerConfig) -> dict[str, Any]:
    """The metrics of importance weights over an iteration; {} without them."""
    if learner.importance_weights == "none":
        return {}
    weights, squares, sequences, units, capped = (
        sum(getattr(total, name) for total in totals) for name in ("weights", "squares", "sequences", "units", "capped")
    )
    return {
        "learner/importance_mean": weights / sequences if sequences else None,
        "learner/importance_ess_share": weights**2 / (sequences * squares) if squares else None,
        "learner/importance_capped_share": capped / units if units else None,
    }
