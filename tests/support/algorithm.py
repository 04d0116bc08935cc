"""Algorithms of one's own, which tests name by their import path: good ones, and ones that break a rule."""

from __future__ import annotations

from typing import get_args

import numpy as np
from torch import Tensor

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner import losses
from pmdflow.learner.advantage import pmd_mean
from pmdflow.learner.algorithms import Algorithm, Terms, of_rewards
from pmdflow.learner.objective import pmd_loss
from pmdflow.learner.view import FROM_TEACHER, ClaimView, Credit, Need, State

VIEWS: list[ClaimView] = []
"""What `SEES` saw, newest last."""
EVERYTHING: frozenset[Need] = frozenset(get_args(Need)) - FROM_TEACHER


def reinforce(terms: Terms, learner: LearnerConfig) -> Tensor:
    """Policy gradient: the log-ratio is always 0 and has a gradient."""
    return pmd_loss(
        terms.logprobs, terms.logprobs.detach(), terms.advantages, terms.trained, tau=9.0, cu_seqlens=terms.cu_seqlens
    )


def _mean(view: ClaimView) -> np.ndarray:
    return pmd_mean(view.rewards, view.groups)


def constant(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    """The mean baseline, told one a token."""
    return Credit(values=_mean(view)[view.episodes], per="token")


def sees(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    """Reads everything; credit depends on what the policy says."""
    VIEWS.append(view)
    values = _mean(view)[view.episodes] * (1 + view.entropies) - view.reference / 10
    mean = float(view.rewards.mean()) if view.num_episodes else 0.0
    return Credit(values=values, per="token", metrics={"reward": mean})


def sees_teacher(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    """Reads everything, and learns nothing."""
    VIEWS.append(view)
    return Credit(values=0 * view.teacher, per="token")


def centered(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    """Token credit minus its mean over the claim, by declared sums."""
    mean = view.totals["sum"] / max(view.totals["count"], 1)
    return Credit(values=view.reference - mean, per="token")


def counts(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    """Counts claims, and gives less credit with each."""
    claims = state["claims"] + 1
    return Credit(
        values=_mean(view) / claims, per="sequence", state={"claims": claims}, metrics={"claims": float(claims)}
    )


def changes(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    """Changes the state that it is given."""
    state["claims"] += 1  # type: ignore[index]
    return Credit(values=_mean(view), per="sequence", state=state)


def doubled(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
    """Each token's gradient twice."""
    return Credit(values=_mean(view), per="sequence", token_weights=np.full(int(view.cu_seqlens[-1]), 2.0))


def _per_sequence(values, **others) -> Algorithm:
    return Algorithm(
        credit=lambda view, learner, state: Credit(values=values(view, learner), per="sequence"),
        loss=losses.pmd,
        **others,
    )


MINE = Algorithm(credit=of_rewards(lambda rewards, groups, learner: rewards - 0.25), loss=reinforce)
PLAIN = Algorithm(credit=of_rewards(lambda rewards, groups, learner: pmd_mean(rewards, groups)), loss=losses.pmd)
DOUBLED = Algorithm(credit=doubled, loss=losses.pmd)
CONSTANT = Algorithm(credit=constant, loss=losses.pmd_tokens)
SEES = Algorithm(credit=sees, loss=losses.pmd_tokens, needs=EVERYTHING)
WIDE = Algorithm(credit=sees, loss=losses.pmd_tokens, needs=EVERYTHING, claim_wide=True)
CENTERED = Algorithm(
    credit=centered,
    loss=losses.pmd_tokens,
    needs=frozenset({"reference"}),
    totals=lambda view, learner: {"sum": float(view.reference.sum()), "count": float(len(view.reference))},
)
COUNTS = Algorithm(credit=counts, loss=losses.pmd, state=lambda: {"claims": 0})
SET = _per_sequence(lambda view, learner: view.rewards - learner.settings["shift"], settings={"shift": 0.25})

LEAKS = _per_sequence(lambda view, learner: view.rewards - view.rewards.mean() if view.num_episodes else view.rewards)
SECRET = _per_sequence(lambda view, learner: view.episode_means(view.reference))
INFINITE = _per_sequence(lambda view, learner: view.rewards + np.inf)
SHAPE = _per_sequence(lambda view, learner: np.zeros(1))
CHANGES = Algorithm(credit=changes, loss=losses.pmd, state=lambda: {"claims": 0})
COLUMNS = Algorithm(
    credit=lambda view, learner, state: Credit(values=_mean(view)[view.episodes] * view.columns["share"], per="token"),
    loss=losses.pmd_tokens,
    columns=frozenset({"share"}),
)
TAUGHT = Algorithm(credit=sees_teacher, loss=losses.pmd_tokens, needs=frozenset(get_args(Need)))
