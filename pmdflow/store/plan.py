"""The rules by which the groups of a claim are dealt to optimizer steps."""

from __future__ import annotations

import numpy as np

from pmdflow.types import ClaimPlan, ClaimRows, Int64


def in_claim_order(num_groups: int, num_steps: int) -> ClaimPlan:
    """Deal groups to steps as they come; the numbers of groups in two steps differ by at most one.

    Example:
        >>> in_claim_order(5, 3).steps
        array([0, 0, 1, 1, 2], dtype=int32)
    """
    sizes = [len(part) for part in np.array_split(np.arange(num_groups), num_steps)]
    steps = np.repeat(np.arange(num_steps, dtype=np.int32), sizes)
    return ClaimPlan(steps=steps, num_steps=num_steps, rule="claim_order", seed=None)


def by_length(lengths: Int64, num_steps: int, *, seed: int, iteration: int) -> ClaimPlan:
    """Deal groups to steps by strata of length, so that every step is a fair draw of the claim.

    The groups, longest first, are cut into strata of `num_steps`; a stratum gives each step one group, beginning at a
    step that is drawn for the stratum. Over the draws each group is equally likely to be in each step, so no step is
    longer than another on average; within a claim the lengths of two steps differ by at most one group of each
    stratum. In claim order the oldest groups come first, and what waited longest is long: step 1 got all of it.

    Args:
        lengths: Tokens of each group after its prompt, in claim order [G].
        num_steps: Steps of the iteration.
        seed: Of the run.
        iteration: Of the claim; with the seed it gives the draws.

    Example:
        >>> by_length(np.array([9, 1, 8, 2]), 2, seed=0, iteration=1).steps
        array([0, 1, 1, 0], dtype=int32)
    """
    count = len(lengths)
    strata, places = np.divmod(np.arange(count), num_steps)
    begins = np.random.default_rng([seed, iteration]).integers(num_steps, size=-(-count // num_steps))
    steps = np.empty(count, np.int32)
    steps[np.argsort(-lengths, kind="stable")] = (places + begins[strata]) % num_steps
    return ClaimPlan(steps=steps, num_steps=num_steps, rule="length_strata", seed=seed)


def deal(batch: ClaimRows, num_steps: int, *, seed: int) -> ClaimPlan:
    """The plan of a claim by today's rule; `seed` is the run's."""
    after_prompt: Int64 = np.diff(batch.cu_seqlens) - batch.prompt_lengths.astype(np.int64)
    starts = batch.group_starts()
    lengths = np.add.reduceat(after_prompt, starts) if len(starts) else after_prompt
    return by_length(lengths, num_steps, seed=seed, iteration=batch.iteration)
