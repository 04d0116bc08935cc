"""Credit for a claim: the view of it that an algorithm gets, and its answer brought back to the micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.algorithm import Algorithm
from pmdflow.learner.batch import StepPlan, is_whole
from pmdflow.learner.steps import Tensors
from pmdflow.learner.sums import all_sum, from_ranks
from pmdflow.learner.token_scores import TokenScores
from pmdflow.learner.view import COLUMN, TOP, Bool, ClaimView, Credit, State
from pmdflow.reward.total import TotalRewards
from pmdflow.types import Claim, Float64, Int64, Mask

Arrays = Mapping[str, npt.NDArray[Any]]
Steps = list[list[Tensors]]
Scores = Sequence[Sequence[tuple[TokenScores, TokenScores | None]]]
"""By step and micro-batch: what pi_i says, and what the teacher says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What an algorithm gave to a claim; equal on all ranks."""

    advantages: Float64
    """One value a trajectory [N]: a mean over tokens where the credit is one a token, 0 for what is not in the view."""
    metrics: dict[str, float]
    state: State | None
    """What the next claim begins with; None for an algorithm that keeps none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Per-token arrays of trajectories, packed in the order of `trajectories`."""

    trajectories: Int64
    lengths: Int64
    arrays: Arrays

    @classmethod
    def of(cls, steps: Sequence[Sequence[Tensors]], scores: Scores, names: frozenset[str]) -> _Rows:
        """Those of a rank, in the order of its micro-batches."""
        pairs = [
            (micro, own)
            for micros, all_scores in zip(steps, scores, strict=True)
            for micro, own in zip(micros, all_scores, strict=True)
            if len(micro.trajectories)
        ]
        none = np.zeros(0, np.int64)
        return cls(
            trajectories=np.concatenate([none, *(micro.trajectories for micro, _ in pairs)]),
            lengths=np.concatenate([none, *(micro.cu_seqlens.diff().cpu().numpy() for micro, _ in pairs)]),
            arrays={
                name: np.concatenate([_array(name, micro, *own) for micro, own in pairs]) if pairs else _none(name)
                for name in sorted(names)
            },
        )

    def gathered(self) -> _Rows:
        """Those of all ranks."""
        parts = from_ranks((self.trajectories, self.lengths, dict(self.arrays)))
        full = [part for part in parts if len(part[0])] or parts[:1]
        return _Rows(
            trajectories=np.concatenate([part[0] for part in full]),
            lengths=np.concatenate([part[1] for part in full]),
            arrays={name: np.concatenate([part[2][name] for part in full]) for name in self.arrays},
        )

    def in_claim_order(self) -> _Rows:
        """The same, sorted by trajectory."""
        order = np.argsort(self.trajectories, kind="stable")
        index = spans((np.cumsum(self.lengths) - self.lengths)[order], self.lengths[order])
        arrays = {name: values[index] for name, values in self.arrays.items()}
        return _Rows(trajectories=self.trajectories[order], lengths=self.lengths[order], arrays=arrays)


def give_credit(
    algorithm: Algorithm,
    learner: LearnerConfig,
    claim: Claim,
    rewards: TotalRewards,
    *,
    filtered: Bool,
    plans: Sequence[StepPlan],
    steps: Steps,
    scores: Scores,
    state: State | None,
) -> tuple[Steps, Given]:
    """Ask the algorithm once, and give the micro-batches of this rank their credit and weights.

    Args:
        algorithm: Gives the credit.
        learner: With all settings of the algorithm.
        claim: The claim.
        rewards: Of its trajectories.
        filtered: Trajectories of groups that the config leaves out [N].
        plans: Every step; they say which rank has which trajectory.
        steps: This rank's micro-batches of each; their weights are the shares of episodes.
        scores: What the policy that opens the iteration, and a teacher, say of them.
        state: The algorithm's.

    Raises:
        ValueError: the algorithm's answer does not fit the claim, or is not finite.
    """
    kept, view, local = _seen(algorithm, claim, rewards, ~filtered, plans, steps, scores)
    if algorithm.totals is not None:
        own = dict(algorithm.totals(view, learner))
        view = replace(view, totals=_summed(own) if local else own)
    credit = algorithm.credit(view, learner, {} if state is None else state).checked(view)
    back = _Back(claim, kept, view, credit)
    given = Given(
        advantages=_over_ranks(back.advantages) if local else back.advantages,
        metrics=_metrics(credit, view, local=local),
        state=_next_state(algorithm, state, credit),
    )
    return [[back.credited(micro) for micro in micros] for micros in steps], given


def _seen(
    algorithm: Algorithm,
    claim: Claim,
    rewards: TotalRewards,
    kept: Bool,
    plans: Sequence[StepPlan],
    steps: Steps,
    scores: Scores,
) -> tuple[Bool, ClaimView, bool]:
    """The trajectories in the view [N], the view, and whether it is this rank's own."""
    if not algorithm.needs and not algorithm.columns:
        return kept, _view(claim, rewards, kept, None), False
    rows = _Rows.of(steps, scores, frozenset(algorithm.needs) | {f"{COLUMN}{name}" for name in algorithm.columns})
    wide = algorithm.claim_wide or algorithm.state is not None or not is_whole(plans, claim.groups)
    rows = (rows.gathered() if wide else rows).in_claim_order()
    if not wide:
        kept = kept & np.isin(claim.groups, claim.groups[rows.trajectories])
    return kept, _view(claim, rewards, kept, rows), not wide


def _next_state(algorithm: Algorithm, state: State | None, credit: Credit) -> State | None:
    if credit.state is None:
        return state
    if algorithm.state is None:
        raise ValueError("credit.state is given, but the algorithm keeps none: Algorithm(state=lambda: {...}, ...)")
    return credit.state


class _Back:
    """From the episodes and tokens of a view to the rows of micro-batches."""

    def __init__(self, claim: Claim, kept: Bool, view: ClaimView, credit: Credit) -> None:
        self._credit = credit
        self._starts, self._lengths = _token_spans(claim, kept)
        first = claim.first_branches()
        place = np.cumsum(kept[first]) - 1
        self._episode = place[claim.episode_of()]
        """The episode of each trajectory among those of the view [N]; without meaning where it is not in it."""
        values = credit.values if credit.per == "sequence" else view.episode_means(credit.values)
        self.advantages = np.zeros(len(kept))
        if len(values):
            self.advantages[kept] = values[self._episode[kept]]

    def credited(self, micro: Tensors) -> Tensors:
        rows, credit = micro.trajectories, self._credit
        if len(rows) == 0:
            if credit.per == "sequence":
                return replace(micro, sequence_credit=torch.zeros_like(micro.weights))
            return replace(micro, token_credit=torch.zeros_like(micro.behavior, dtype=torch.float64))

        def tensor(values: Float64) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(micro.weights.device)

        tokens = spans(self._starts[rows], self._lengths[rows])
        changes: dict[str, Any] = {}
        if credit.per == "sequence":
            changes["sequence_credit"] = tensor(credit.values[self._episode[rows]])
        else:
            changes["token_credit"] = tensor(credit.values[tokens])
        if credit.weights is not None:
            changes["weights"] = micro.weights * tensor(credit.weights[self._episode[rows]])
        if credit.token_weights is not None:
            changes["token_weights"] = tensor(credit.token_weights[tokens])
        return replace(micro, **changes)


def spans(starts: Int64, lengths: Int64) -> Int64:
    """The indices from each start on, so many, one span after another."""
    before = np.cumsum(lengths) - lengths
    return np.asarray(np.arange(lengths.sum()) + np.repeat(starts - before, lengths), np.int64)


def _token_spans(claim: Claim, kept: Bool) -> tuple[Int64, Int64]:
    """Where the generated tokens of each trajectory begin among those of the kept ones, and how many they are [N]."""
    lengths = np.where(kept, claim.count(Mask.GENERATED), 0)
    return np.cumsum(lengths) - lengths, lengths


def _view(claim: Claim, rewards: TotalRewards, kept: Bool, rows: _Rows | None) -> ClaimView:
    first = claim.first_branches()
    first = first[kept[first]]
    episode = claim.episode_of()
    lengths = np.bincount(episode, weights=_token_spans(claim, kept)[1]).astype(np.int64)[episode[first]]
    return ClaimView(
        iteration=claim.iteration,
        version=claim.version,
        rewards=rewards.total[first],
        components={name: values[first] for name, values in rewards.components.items()},
        component_weights=rewards.weights,
        correct=rewards.correct[first],
        groups=claim.groups[first],
        prompt_ids=tuple(claim.prompt_ids[index] for index in first),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        per_token={} if rows is None else _per_token(claim, rows),
    )


def _per_token(claim: Claim, rows: _Rows) -> Arrays:
    """The arrays as they are, but for the turns: a trajectory counts its own, an episode those of all its branches."""
    if "turns" not in rows.arrays:
        return rows.arrays
    episode, turns = claim.episode_of()[rows.trajectories], rows.arrays["turns"]
    filled = np.flatnonzero(rows.lengths)
    counts = np.zeros(len(rows.lengths), np.int64)
    counts[filled] = turns[np.cumsum(rows.lengths)[filled] - 1] + 1
    before = np.cumsum(counts) - counts
    first = np.searchsorted(episode, episode)
    return {**rows.arrays, "turns": turns + np.repeat(before - before[first], rows.lengths)}


def _both_tops(scores: TokenScores, teacher: TokenScores) -> torch.Tensor | None:
    """Log-probs of the same tokens under both [P, 2, K]."""
    if scores.top_logprobs is None or teacher.top_logprobs is None:
        return None
    return torch.stack([scores.top_logprobs, teacher.top_logprobs], dim=1)


def _array(name: str, micro: Tensors, scores: TokenScores, teacher: TokenScores | None) -> npt.NDArray[Any]:
    if name.startswith(COLUMN):
        return micro.columns[name.removeprefix(COLUMN)]
    tensors = {
        "reference": scores.logprobs,
        "teacher": None if teacher is None else teacher.logprobs,
        "top": None if teacher is None else _both_tops(scores, teacher),
        "entropies": scores.entropies,
        "entropy_flow": scores.flow,
        "behavior": micro.behavior,
        "trained": micro.trained,
        "tokens": micro.targets,
        "turns": micro.turns,
        "turn_keys": micro.turn_keys,
        "turn_rewards": micro.turn_rewards,
        "versions": micro.versions,
    }
    found = tensors[name]
    assert found is not None, f"the reference pass did not compute {name}"
    return found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else found


def _none(name: str) -> npt.NDArray[Any]:
    """The array of a rank, or a claim, without a token."""
    whole = {"trained": np.bool_, "versions": np.int32, "turns": np.int32, "turn_keys": np.int64, "tokens": np.int64}
    types = {**whole, "turn_rewards": np.float64}
    return np.zeros((0, 2, TOP) if name == "top" else 0, types.get(name, np.float32))


def _summed(own: Mapping[str, float]) -> dict[str, float]:
    parts = from_ranks(dict(own))
    names = sorted({name for part in parts for name in part})
    return {name: float(sum(part.get(name, 0.0) for part in parts)) for name in names}


def _metrics(credit: Credit, view: ClaimView, *, local: bool) -> dict[str, float]:
    named = {f"learner/credit_{name}": float(value) for name, value in credit.metrics.items()}
    if not local:
        return named
    episodes = float(view.num_episodes)
    parts = from_ranks((episodes, named if episodes else {}))
    total = sum(count for count, _ in parts)
    names = sorted({name for _, values in parts for name in values})
    return {name: sum(count * values.get(name, 0.0) for count, values in parts) / total for name in names}


def _over_ranks(values: Float64) -> Float64:
    return np.array(all_sum(values.tolist(), torch.device("cpu")))
