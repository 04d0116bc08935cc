"""Which tokens of a claim are trained, and how much each sequence counts: group filter, veto, importance weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.advantage import keep_groups
from pmdflow.learner.batch import Bool, StepPlan
from pmdflow.learner.correction import importance_weights, sequence_weights, veto
from pmdflow.learner.layout import unpack
from pmdflow.learner.steps import Tensors
from pmdflow.learner.sums import added, all_sum, over_ranks
from pmdflow.types import ClaimRows, Float64, Int64


def groups_left_out(claim: ClaimRows, rewards: Float64, learner: LearnerConfig) -> Bool:
    """Trajectories [N] of groups whose mean reward the config leaves out."""
    low, high = learner.keep_groups_above, learner.keep_groups_below
    first = claim.first_branches()
    return ~keep_groups(rewards[first], claim.groups[first], low=low, high=high)[claim.episode_of()]


def veto_sequences(
    plans: Sequence[StepPlan],
    steps: Sequence[Sequence[Tensors]],
    anchors: Sequence[Sequence[Tensor]],
    counts: Int64,
    shares: Float64,
    device: torch.device,
) -> tuple[list[StepPlan], list[list[Tensors]], Bool]:
    """Empty the masks of vetoed trajectories and take them out of the denominators.

    Args:
        plans: Every step.
        steps: This rank's micro-batches of each.
        anchors: The learner's log-probs of each micro-batch, log pi_i.
        counts: Trained tokens of each trajectory [N].
        shares: What each counts for [N].
        device: For the sum over ranks.

    Returns:
        The first two without the vetoed, and which trajectories they are, on whatever rank [N].
    """
    found = np.zeros(len(counts))
    for micros, logprobs in zip(steps, anchors, strict=True):
        for micro, anchor in zip(micros, logprobs, strict=True):
            drop = veto(anchor, micro.behavior, micro.trained, cu_seqlens=micro.cu_seqlens).cpu().numpy()
            found[micro.trajectories[drop[: len(micro.trajectories)]]] = 1.0
    vetoed = np.array(all_sum(found.tolist(), device)) > 0
    left = [_without(plan, vetoed, counts, shares) for plan in plans]
    return left, [[_emptied(micro, vetoed) for micro in micros] for micros in steps], vetoed


def _without(plan: StepPlan, vetoed: Bool, counts: Int64, shares: Float64) -> StepPlan:
    gone = [index for rank in plan.ranks for micro in rank for index in micro if vetoed[index]]
    return replace(
        plan,
        num_sequences=plan.num_sequences - float(shares[gone].sum()),
        num_tokens=plan.num_tokens - int(counts[gone].sum()),
        weighted_tokens=plan.weighted_tokens - float((shares * counts)[gone].sum()),
    )


def _emptied(micro: Tensors, vetoed: Bool) -> Tensors:
    if len(micro.trajectories) == 0:
        return micro
    gone = torch.from_numpy(vetoed[micro.trajectories]).to(micro.trained.device)
    return replace(micro, trained=micro.trained & ~unpack(gone, micro.cu_seqlens))


@dataclass(frozen=True, slots=True)
class Weighed:
    """The importance weights of one step, as sums that can be added over ranks."""

    weights: float
    """Sum over trained sequences of their weight, before it is normalized."""
    squares: float
    sequences: float
    unit_weights: float
    """Sum over what is weighted, tokens or sequences; its mean is what `importance_normalize` divides by."""
    units: float
    capped: float
    """Tokens or sequences whose weight is the cap."""


def weigh(
    micros: Sequence[Tensors], anchors: Sequence[Tensor], learner: LearnerConfig, device: torch.device
) -> tuple[list[Tensors], Weighed]:
    """Multiply the importance weights of one step in; `anchors` are the learner's log-probs, log pi_i.

    Returns:
        The micro-batches, and the sums over all ranks.
    """
    found = [_weights(anchor, micro, learner) for micro, anchor in zip(micros, anchors, strict=True)]
    total = over_ranks(added(Weighed, (part for _, part in found)), device)
    mean = total.unit_weights / total.units if learner.importance_normalize and total.unit_weights > 0 else 1.0
    weighed = [
        replace(micro, weights=micro.weights * own.to(micro.weights) / mean)
        for micro, (own, _) in zip(micros, found, strict=True)
    ]
    return weighed, total


def _weights(anchor: Tensor, micro: Tensors, learner: LearnerConfig) -> tuple[Tensor, Weighed]:
    """The importance weight of each sequence [B], not normalized, and this rank's sums."""
    level = "sequence" if learner.importance_weights == "sequence" else "token"
    cu, trained = micro.cu_seqlens, micro.trained
    per_token = importance_weights(
        anchor.double(),
        micro.behavior.double(),
        trained,
        level=level,  # type: ignore[arg-type]
        cap=learner.importance_cap,
        cu_seqlens=cu,
    )
    own = sequence_weights(per_token, trained, cu_seqlens=cu)
    active = sequence_weights(trained.double(), trained, cu_seqlens=cu) > 0
    units = own[active] if level == "sequence" else per_token[trained]
    return own, Weighed(
        weights=float(own[active].sum()),
        squares=float((own[active] ** 2).sum()),
        sequences=float(active.sum()),
        unit_weights=float(units.sum()),
        units=float(units.numel()),
        capped=float((units >= learner.importance_cap).sum()),
    )


def importance_metrics(steps: Sequence[Weighed]) -> dict[str, Any]:
    """The metrics of importance weights over an iteration; {} without them."""
    if not steps:
        return {}
    total = added(Weighed, steps)
    return {
        "learner/importance_mean": total.weights / total.sequences if total.sequences else None,
        "learner/importance_ess_share": total.weights**2 / (total.sequences * total.squares) if total.squares else None,
        "learner/importance_capped_share": total.capped / total.units if total.units else None,
    }
