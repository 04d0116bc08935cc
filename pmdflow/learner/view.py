"""What an algorithm sees of a claim when it gives credit, and what it answers. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmdflow.types import Float64, Int32, Int64

Need = Literal[
    "reference",
    "behavior",
    "versions",
    "turns",
    "turn_keys",
    "turn_rewards",
    "trained",
    "entropies",
    "entropy_flow",
    "tokens",
    "teacher",
    "top",
]
"""Per-token arrays that `Algorithm.needs` may name; what is not named is not gathered."""
FROM_REFERENCE = frozenset[Need]({"reference", "entropies", "entropy_flow", "top"})
"""Those that the pass of the policy over the claim gives, before the first step."""
FROM_TEACHER = frozenset[Need]({"teacher", "top"})
"""Those that want `learner.teacher`."""
COLUMN = "column "
"""Before the name of an extra column among the per-token arrays of a view."""
TOP = 16
"""Of the likeliest tokens under pi_i, so many at each position are scored where an algorithm needs `top`."""
State = Mapping[str, Any]
"""What an algorithm keeps from claim to claim: numbers, texts, and lists or mappings of them, as JSON has them."""
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimView:
    """The kept groups of a claim: N episodes and the P tokens that the policy generated in them.

    Groups that the config leaves out are not in it, and members without a trained token are: a baseline counts them.
    Whole groups only. Where an algorithm `needs` per-token arrays and the learner has several ranks, each rank sees
    the groups that it trains, unless the algorithm is `claim_wide` or keeps a state; `totals` are of all ranks anyway.

    Example:
        >>> view = ClaimView.of_rewards([1.0, 0.0], [0, 0])
        >>> view.num_episodes, view.correct.tolist()
        (2, [True, False])
    """

    iteration: int
    version: int
    """Of the policy that opens the iteration, pi_i."""
    rewards: Float64
    """Total reward, with length reward and penalties [N]."""
    components: Mapping[str, Float64]
    """What each reward function gave, unweighted, by name, each [N]; NaN where an episode has none."""
    correct: Bool
    """[N]: one threshold for all methods, `pmdflow.reward.total.CORRECT_REWARD`."""
    groups: Int64
    """[N]"""
    prompt_ids: tuple[str, ...]
    """[N]"""
    cu_seqlens: Int64
    """Where each episode begins among the P generated tokens, and the end [N + 1]."""
    component_weights: Mapping[str, float] = field(default_factory=dict)
    """What `reward.functions` says that each counts, by component; those of a source's own functions are not here."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """What `Algorithm.totals` gave, added over all groups of the claim."""
    per_token: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """The arrays that the algorithm needs, each [P, ...]; its properties below read them."""

    @classmethod
    def of_rewards(cls, rewards: npt.ArrayLike, groups: npt.ArrayLike, **others: Any) -> ClaimView:
        """A view of made-up episodes, each of one token unless `cu_seqlens` is given: for tests of an algorithm."""
        values = np.asarray(rewards, np.float64)
        given: dict[str, Any] = {
            "iteration": 1,
            "version": 0,
            "components": {},
            "correct": values >= 0.5,
            "prompt_ids": ("",) * len(values),
            "cu_seqlens": np.arange(len(values) + 1),
        }
        return cls(rewards=values, groups=np.asarray(groups, np.int64), **{**given, **others})

    @property
    def columns(self) -> Mapping[str, npt.NDArray[Any]]:
        """Extra columns that `Algorithm.columns` names, each [P, ...]; NaN, or 0 in whole numbers, where none is."""
        return {name.removeprefix(COLUMN): own for name, own in self.per_token.items() if name.startswith(COLUMN)}

    @property
    def num_episodes(self) -> int:
        """N."""
        return len(self.rewards)

    @property
    def lengths(self) -> Int64:
        """Generated tokens of each episode [N]."""
        return np.diff(self.cu_seqlens)

    @property
    def episodes(self) -> Int64:
        """The episode of each token [P], by its index."""
        return np.repeat(np.arange(self.num_episodes), self.lengths)

    @property
    def reference(self) -> Float64:
        """log pi_i of each token [P]."""
        return self._token("reference").astype(np.float64)

    @property
    def behavior(self) -> Float64:
        """Log-prob of each token when it was generated [P]."""
        return self._token("behavior").astype(np.float64)

    @property
    def entropies(self) -> Float64:
        """Entropy of pi_i where each token was drawn, in nats [P]."""
        return self._token("entropies").astype(np.float64)

    @property
    def entropy_flow(self) -> Float64:
        """First-order change of that entropy by a step of size 1 along the gradient of the token's log-prob [P].

        Credit A makes it A times that: -A [p_y (log p_y + H) - sum_k p_k^2 (log p_k + H)], by the token's logits.
        """
        return self._token("entropy_flow").astype(np.float64)

    @property
    def versions(self) -> Int32:
        """Policy version that generated each token [P]."""
        return self._token("versions")

    @property
    def turns(self) -> Int64:
        """Number of each token's turn in its episode, from 0 [P]: a turn is what no observed token interrupts."""
        return self._token("turns")

    @property
    def turn_keys(self) -> Int64:
        """Hash of the state in which each token's turn began [P]: its `key`, else what was observed before the turn."""
        return self._token("turn_keys")

    @property
    def turn_rewards(self) -> Float64:
        """What the environment rewarded each token's turn with [P], in `rewards` or not; 0 where it said nothing."""
        return self._token("turn_rewards").astype(np.float64)

    @property
    def trained(self) -> Bool:
        """Which tokens have a gradient [P]."""
        return self._token("trained")

    @property
    def tokens(self) -> Int64:
        """Token ids [P]."""
        return self._token("tokens")

    def component(self, name: str) -> Float64:
        """What the reward function of that name gave, unweighted [N].

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.components:
            known = ", ".join(self.components) or "none"
            raise ValueError(f"the algorithm reads the reward component {name!r}; reward.functions give {known}")
        return self.components[name]

    @property
    def teacher(self) -> Float64:
        """Log-prob of each token under the teacher [P]."""
        return self._token("teacher").astype(np.float64)

    @property
    def student_top(self) -> Float64:
        """Log-probs under pi_i of its `TOP` likeliest tokens where each was drawn [P, K]."""
        return self._token("top")[:, 0].astype(np.float64)

    @property
    def teacher_top(self) -> Float64:
        """Log-probs of the same tokens under the teacher [P, K]."""
        return self._token("top")[:, 1].astype(np.float64)

    def episode_means(self, values: Float64) -> Float64:
        """The mean of [P] values over each episode [N]; 0 for one without a token."""
        sums = np.bincount(self.episodes, weights=values, minlength=self.num_episodes)
        return np.asarray(sums / np.maximum(self.lengths, 1))

    def _token(self, name: str) -> npt.NDArray[Any]:
        if name not in self.per_token:
            raise ValueError(
                f"the algorithm reads view.{name} and does not say so: Algorithm(needs=frozenset({{{name!r}}}), ...)"
            )
        return self.per_token[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What each episode or token of a view is worth: `Credit(values=np.array([0.5, -0.5]), per="sequence")`."""

    values: Float64
    """[N], or [P] if `per` is `token`."""
    per: Literal["sequence", "token"]
    """What `values` has one of; never told by the shape: all answers may have one token."""
    weights: Float64 | None = None
    """Of the loss of each episode [N]; None is 1. They never change a denominator."""
    token_weights: Float64 | None = None
    """What the gradient of each token's log-prob is multiplied by [P], whatever the loss; None is 1."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over the view's episodes, recorded as `learner/credit_NAME`; ranks are averaged by their episodes."""
    state: State | None = None
    """What the next claim begins with; None keeps the state as it is."""

    def checked(self, view: ClaimView) -> Credit:
        """The same, in float64.

        Raises:
            ValueError: a shape is wrong, or a value is not finite; names which.
        """
        tokens = int(view.cu_seqlens[-1])
        expected = {
            "values": view.num_episodes if self.per == "sequence" else tokens,
            "weights": view.num_episodes,
            "token_weights": tokens,
        }
        arrays: dict[str, Any] = {}
        for name, size in expected.items():
            given = getattr(self, name)
            arrays[name] = None if given is None else np.asarray(given, np.float64)
            if given is None:
                continue
            if arrays[name].shape != (size,):
                raise ValueError(
                    f"credit.{name} has shape {arrays[name].shape} where ({size},) is due: the view has "
                    f"{view.num_episodes} episodes of {tokens} tokens, and credit.per is {self.per!r}"
                )
            bad = np.flatnonzero(~np.isfinite(arrays[name]))
            if bad.size:
                raise ValueError(
                    f"credit.{name}[{bad[0]}] is {arrays[name][bad[0]]}: give finite numbers, 0 for no credit"
                )
        return Credit(per=self.per, metrics=self.metrics, state=self.state, **arrays)
