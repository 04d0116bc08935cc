"""What an algorithm is: credit for a claim, and the loss of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.layout import unpack
from pmdflow.learner.objective import Ratio
from pmdflow.learner.view import ClaimView, Credit, Need, State
from pmdflow.types import Float64, Int64

CreditFunction = Callable[[ClaimView, LearnerConfig, State], Credit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The arguments of a loss: one micro-batch, packed over P generated tokens of B sequences."""

    logprobs: Tensor
    """log pi_theta [P], with gradient."""
    entropies: Tensor
    """Entropy of pi_theta where each token was drawn [P], with gradient."""
    anchor: Tensor
    """Log-probs that the policy is compared with [P]: log pi_i, or those recorded at generation."""
    behavior: Tensor
    """Log-probs recorded at generation [P]."""
    sequence_credit: Tensor | None
    """[B]; None if the credit is one a token."""
    token_credit: Tensor | None
    """[P]; None if the credit is one a sequence."""
    weights: Tensor
    """Of the algorithm, times importance weights [B]; constants that never change a denominator."""
    trained: Tensor
    """bool [P]"""
    scope: Tensor
    """bool [P]: the tokens over which the sequence log-ratio u and the length L run."""
    cu_seqlens: Tensor
    """[B + 1]"""
    max_tokens: int
    """Most generated tokens of a trajectory."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Extra columns that the algorithm names, each [P, ...]."""
    alternatives: Tensor | None = None
    """log pi_theta of the tokens whose ids `Algorithm.alternatives` names [P, K], with gradient."""
    iteration: int = 1
    """Of the claim."""

    @property
    def advantages(self) -> Tensor:
        """The credit of each sequence [B].

        Raises:
            ValueError: the credit is one a token.
        """
        if self.sequence_credit is None:
            raise ValueError("the credit is one a token: its loss reads terms.token_advantages, not terms.advantages")
        return self.sequence_credit

    @property
    def token_advantages(self) -> Tensor:
        """The credit of each token [P]; that of its sequence if the credit is one a sequence."""
        if self.token_credit is None:
            return unpack(self.advantages, self.cu_seqlens)
        return self.token_credit

    def anchor_of(self, ratio: Ratio) -> Tensor:
        """What a ratio is taken to [P]: CTPO's prefix ratio begins at the engine, the others at the anchor."""
        return self.behavior if ratio == "prefix" else self.anchor


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Pure functions, and what the loss is a mean over.

    Example:
        >>> from pmdflow.learner.losses import pmd
        >>> Algorithm(credit=of_rewards(lambda rewards, groups, learner: rewards), loss=pmd).mean_over
        'sequences'
    """

    credit: CreditFunction
    """What each episode or token is worth; called once a claim, after the reference pass and before the veto. The state
    is that of the claim before, {} without one."""
    loss: Callable[[Terms, LearnerConfig], Tensor]
    """The mean loss of a micro-batch, a scalar; 0 if nothing in it is trained."""
    needs: frozenset[Need] = frozenset()
    """Per-token arrays that `credit` reads. With any, whole groups are put on one rank where that unbalances ranks by
    5 % at most; else the arrays of all ranks are gathered."""
    columns: frozenset[str] = frozenset()
    """Extra columns of tokens that `credit` reads as `view.columns` and the loss as `terms.columns`: those that engines
    and `learner.scorers` give."""
    alternatives: str | None = None
    """The column with ids of other tokens [P, K] whose log-probs the loss reads as `terms.alternatives`."""
    totals: Callable[[ClaimView, LearnerConfig], Mapping[str, float]] | None = None
    """Sums over a view's groups, added over ranks before `credit`, which reads `view.totals`: statistics of the whole
    claim without gathering it."""
    claim_wide: bool = False
    """Gather the per-token arrays of all ranks: every rank sees the whole claim."""
    state: Callable[[], State] | None = None
    """The first state, for an algorithm that keeps some: `Credit.state` is the next one. It is saved in checkpoints,
    and `credit` sees the whole claim."""
    settings: Mapping[str, float | str] = field(default_factory=dict)
    """What `learner.settings` may change, with the defaults; `credit` and `loss` read `learner.settings`."""
    clipped: Callable[[Terms, LearnerConfig], Tensor] | None = None
    """Trained tokens of a micro-batch whose objective is clipped, a count; None for an algorithm without a band."""
    mean_over: Literal["sequences", "tokens"] = "sequences"
    """What the loss divides by: sequences with a trained token, or trained tokens. The step's count replaces it."""

    def configured(self, learner: LearnerConfig) -> LearnerConfig:
        """The learner's section with every setting of the algorithm.

        Raises:
            ValueError: a setting is not known, or of another type than its default.
        """
        for name, value in learner.settings.items():
            if name not in self.settings:
                known = ", ".join(self.settings) or "none"
                raise ValueError(
                    f"learner.settings.{name}: {learner.algorithm} has no such setting; it has {known}: leave it out"
                )
            if isinstance(value, str) != isinstance(self.settings[name], str):
                raise ValueError(
                    f"learner.settings.{name} is {value!r}: give a value like the default, {self.settings[name]!r}"
                )
        return learner.model_copy(update={"settings": {**self.settings, **learner.settings}})


def of_rewards(
    values: Callable[[Float64, Int64, LearnerConfig], Float64],
    weights: Callable[[Float64, Int64, LearnerConfig], Float64] | None = None,
) -> CreditFunction:
    """Credit, one a sequence, from functions of rewards [N] and group ids [N]."""

    def credit(view: ClaimView, learner: LearnerConfig, state: State) -> Credit:
        own = None if weights is None else weights(view.rewards, view.groups, learner)
        return Credit(values=values(view.rewards, view.groups, learner), per="sequence", weights=own)

    return credit
