"""The rules by which the groups of a claim are dealt to optimizer steps."""

from __future__ import annotations

import numpy as np

from pmdflow.types import ClaimPlan


def in_claim_order(num_groups: int, num_steps: int) -> ClaimPlan:
    """Deal groups to steps as they come; the numbers of groups in two steps differ by at most one.

    Example:
        >>> in_claim_order(5, 3).steps
        array([0, 0, 1, 1, 2], dtype=int32)
    """
    sizes = [len(part) for part in np.array_split(np.arange(num_groups), num_steps)]
    steps = np.repeat(np.arange(num_steps, dtype=np.int32), sizes)
    return ClaimPlan(steps=steps, num_steps=num_steps, rule="claim_order", seed=None)
