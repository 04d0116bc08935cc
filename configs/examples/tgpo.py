"""TGPO: GRPO, and the cross entropy of the teacher's likeliest token where the student is. Alternative ids.

The weight of the cross entropy falls by a line to 0 at iteration `until`. That it starts at 0.1 is the released code's
default; the paper's was not found. The teacher is a frozen scorer with `top: 1`.

Source: arXiv:2605.13230.
"""

from __future__ import annotations

import torch

from pmdflow.learner.algorithms import ALGORITHMS, Algorithm
from pmdflow.learner.objective import weighted_sft_loss

GRPO = ALGORITHMS["grpo"]


def loss(terms, learner):
    """The mean over sequences of both parts."""
    left = max(0.0, 1 - terms.iteration / float(learner.settings["until"]))
    likeliest = terms.alternatives[:, 0]
    ones = torch.ones_like(terms.weights)
    cross_entropy = weighted_sft_loss(likeliest, terms.trained, ones, cu_seqlens=terms.cu_seqlens)
    return GRPO.loss(terms, learner) + float(learner.settings["weight"]) * left * cross_entropy


TGPO = Algorithm(
    credit=GRPO.credit,
    loss=loss,
    clipped=GRPO.clipped,
    alternatives="teacher_top_ids",
    settings={"weight": 0.1, "until": 200.0},
)
