"""LEAD: short right answers, by a target length of each group and by weights that follow how unstable each reward is.

Group reward and state. `alpha` is a setting because no value of it was found; credit is whitened by answer, not by
token as in the paper, so that long answers do not count more.

Source: arXiv:2605.09806.
"""

from __future__ import annotations

import numpy as np

from pmdflow.learner.advantage import grpo
from pmdflow.learner.algorithms import Algorithm, Credit
from pmdflow.learner.losses import pmd

EFFICIENCY = "lead.efficiency.value"


def efficiency(view, history, least=16, most=448):
    """max(-1, 1 - |length - L| / L), where L is the mean length of the group's right answers between the bounds."""
    target = np.clip(view.lengths[view.correct].mean(), least, most) if view.correct.any() else float(most)
    return {"value": np.maximum(-1.0, 1 - np.abs(view.lengths - target) / target)}


def spread(values, groups):
    """Mean, and the deviation over it: within groups and of their means together."""
    if not len(values):
        return 0.0, 0.0
    parts = [values[groups == group] for group in np.unique(groups)]
    variance = np.mean([part.var() for part in parts]) + np.var([part.mean() for part in parts]) + 1e-8
    return values.mean(), np.sqrt(variance) / max(abs(values.mean()), 1e-8)


def credit(view, learner, state):
    """Both rewards normalized, weighted by the state, and whitened."""
    if not view.num_episodes:
        return Credit(values=np.zeros(0), per="sequence")
    right, lengths = view.correct.astype(float), view.component(EFFICIENCY)
    rewards = [right, lengths]
    found = [spread(right, view.groups), spread(lengths[view.correct], view.groups[view.correct])]
    ratios = np.array([cv for _, cv in found]) / max(sum(cv for _, cv in found), 1e-8)
    open_ = np.array([max(1 - mean, 0.0) for mean, _ in found]) ** learner.settings["alpha"]
    wanted = ratios * open_ / max((ratios * open_).sum(), 1e-8)
    weights = 0.95 * np.array(state["weights"]) + 0.05 * wanted
    weights = np.array([max(weights[0], 0.3), 1 - max(weights[0], 0.3)])
    summed = sum(weight * grpo(reward, view.groups) for weight, reward in zip(weights, rewards, strict=True))
    values = (summed - summed.mean()) / (summed.std() + 1e-8)
    metrics = {"correctness_weight": weights[0], "efficiency": lengths.mean()}
    return Credit(values=values, per="sequence", state={"weights": weights.tolist()}, metrics=metrics)


LEAD = Algorithm(credit=credit, loss=pmd, state=lambda: {"weights": [0.5, 0.5]}, settings={"alpha": 1.0})
