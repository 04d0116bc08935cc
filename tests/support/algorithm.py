"""An algorithm of one's own, which tests name by its import path."""

from __future__ import annotations

from torch import Tensor

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.algorithms import Algorithm, Terms
from pmdflow.learner.objective import pmd_loss


def reinforce(terms: Terms, learner: LearnerConfig) -> Tensor:
    """Policy gradient: the log-ratio is always 0 and has a gradient."""
    return pmd_loss(
        terms.logprobs, terms.logprobs.detach(), terms.advantages, terms.trained, tau=9.0, cu_seqlens=terms.cu_seqlens
    )


MINE = Algorithm(advantages=lambda rewards, groups, learner: rewards - 0.25, loss=reinforce)
