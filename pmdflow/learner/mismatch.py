"""How far the log-probs that were recorded at generation are from those of the learner, by the age of the tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pmdflow.learner.steps import Tensors
from pmdflow.learner.sums import all_sum

AGES = 9
"""Ages told apart: 0 to 7, and all above together."""


def mismatch_by_age(pairs: Iterable[tuple[Tensors, Tensor]], device: torch.device) -> list[float | None]:
    """Mean of log behavior - log pi_i over the generated tokens of each age, over all ranks; None where there is none.

    At age 0 it is what engine and learner compute differently under the same weights; its growth with age is the
    distance that the policy has moved since. Every rank must call.

    Args:
        pairs: Micro-batches of this rank, and log pi_i of their generated tokens [P].
        device: Where the ranks add up.
    """
    totals = torch.zeros(2 * AGES, dtype=torch.float64)
    for micro, logprobs in pairs:
        if not len(micro.trajectories):
            continue  # it only keeps pace with the other ranks
        ages = micro.ages.clamp(0, AGES - 1).long()
        difference = micro.behavior.double() - logprobs.detach().double()
        kept = torch.isfinite(difference)
        sums = torch.zeros(2, AGES, dtype=torch.float64, device=difference.device)
        sums[0].index_add_(0, ages[kept], difference[kept])
        sums[1].index_add_(0, ages[kept], torch.ones_like(difference[kept]))
        totals += sums.flatten().cpu()
    values = all_sum(totals.tolist(), device)
    return [total / count if count else None for total, count in zip(values[:AGES], values[AGES:], strict=True)]
