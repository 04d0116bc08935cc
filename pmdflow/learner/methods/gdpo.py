"""GDPO: every reward normalized by itself before they are added, so that none drowns the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.advantage import grpo
from pmdflow.learner.algorithm import Algorithm
from pmdflow.learner.losses import pmd
from pmdflow.learner.view import ClaimView, Credit, State
from pmdflow.types import Float64

SMALLEST = 1e-6
"""Directions with less than so much of the largest one's variance are left out of the whitening."""


def gdpo(
    components: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    weights: Sequence[float] | None = None,
    decorrelate: Literal["none", "zca"] = "none",
    eps: float = 1e-8,
) -> Float64:
    """The weighted sum of each reward's z-scores within its group; `zca` whitens these first.

    Whitening is by the symmetric root of the pseudo-inverse of the z-scores' correlations, pooled over all groups,
    for one group may have fewer members than rewards: a reward listed twice then counts sqrt(2), not 2. A reward
    without variance has no part in it. (RDPO whitens after a map of quantiles that is not published: this is not RDPO.)

    `components` [n, m] are the rewards, `weights` [m] theirs, 1 by default; `eps` is added to each standard deviation,
    which has n - 1 in its denominator.

    Raises:
        ValueError: a shape is wrong, a value is not finite, or `decorrelate` is not known.

    Source: arXiv:2601.05242; whitening as in arXiv:2605.13641.
    """
    values = np.asarray(components, np.float64)
    if values.ndim != 2:
        raise ValueError(f"components have shape {values.shape}; give one column for each reward: [n, m]")
    factors = np.ones(values.shape[1]) if weights is None else np.asarray(weights, np.float64)
    if factors.shape != (values.shape[1],):
        raise ValueError(f"weights have shape {factors.shape}, but there are {values.shape[1]} rewards: give one each")
    if decorrelate not in ("none", "zca"):
        raise ValueError(f"decorrelate is {decorrelate!r}; it must be 'none' or 'zca'")
    scores = np.column_stack([grpo(column, groups, eps=eps) for column in values.T]) if values.size else values
    if decorrelate == "zca" and scores.size:
        _, inverse, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
        scores = scores @ _whitening(scores[sizes[inverse] > 1])  # who is alone has a reward, not a z-score
    return np.asarray(scores @ factors)


def _whitening(scores: Float64) -> Float64:
    """The symmetric map that makes the columns uncorrelated, each with the variance that it had alone [m, m]."""
    norms = np.sqrt((scores**2).sum(axis=0))
    live = norms > 0
    whitening = np.zeros((len(norms), len(norms)))
    if live.any():
        unit = scores[:, live] / norms[live]
        size, axes = np.linalg.eigh(unit.T @ unit)
        kept = size > SMALLEST * size.max()
        whitening[np.ix_(live, live)] = axes[:, kept] / np.sqrt(size[kept]) @ axes[:, kept].T
    return whitening


def _credit(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    # A prompt of another source has no such component: it says nothing there.
    columns = np.array([np.nan_to_num(values) for values in view.components.values()])
    values = gdpo(
        columns.reshape(len(view.components), view.num_episodes).T,
        view.groups,
        weights=[view.component_weights.get(name, 1.0) for name in view.components],
        decorrelate=learner.settings["decorrelate"],  # type: ignore[arg-type]
    )
    return Credit(values=values, per="sequence")


GDPO = Algorithm(credit=_credit, loss=pmd, claim_wide=True, settings={"decorrelate": "none"})
"""Of `reward.functions` with their weights, under policy mirror descent."""
