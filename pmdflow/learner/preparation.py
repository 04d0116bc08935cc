"""All that comes before the first step of a claim: plan, reference pass, teacher, credit, veto, importance weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from pmdflow.config.schema import Config, LearnerConfig
from pmdflow.learner.algorithm import Algorithm
from pmdflow.learner.batch import Bool, ReadTokens, StepPlan, pack_rank, plan_iteration
from pmdflow.learner.crediting import Given, give_credit
from pmdflow.learner.mismatch import mismatch_by_age
from pmdflow.learner.policy import Policy
from pmdflow.learner.routing import EXPERTS
from pmdflow.learner.scorers.claim import ClaimScorers, Kept
from pmdflow.learner.scorers.teacher import TEACHER, TOP_IDS, TOP_LOGPROBS
from pmdflow.learner.selection import Weighed, groups_left_out, veto_sequences, weigh
from pmdflow.learner.steps import Tensors, mismatch_sums, reference_pass, teacher_pass
from pmdflow.learner.sums import StepSums, Sums, added, all_sum, num_across, over_ranks, sum_in_place
from pmdflow.learner.token_scores import TokenScores
from pmdflow.learner.view import FROM_REFERENCE, FROM_TEACHER, TOP, State
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.reward.total import Memory, TotalRewards, total_rewards
from pmdflow.types import Claim, Float64, Int64, Mask

Steps = list[list[Tensors]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a rank prepares a claim with."""

    config: Config
    """Its learner section has every setting of the algorithm."""
    algorithm: Algorithm
    policy: Policy
    teacher: Policy | None
    scorers: ClaimScorers
    rank: int
    device: torch.device
    spans: SpanBuffer
    quadratic: float
    """`Speed.quadratic`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A claim before its first step: by step of the iteration, this rank's micro-batches."""

    plans: list[StepPlan]
    steps: Steps
    anchors: list[list[Tensor]]
    """Log-probs that the policy is compared with."""
    left_out: dict[str, Bool]
    """Trajectories [N] by reason."""
    weighed: list[Weighed]
    rewards: TotalRewards
    given: Given
    scored: dict[str, float]
    """Metrics of scorers that learned, equal on all ranks."""


def prepare(
    parts: Parts, claim: Claim, read: ReadTokens, sums: Sums, *, steps: int, state: State | None, memory: Memory
) -> Ready:
    """Make a claim ready for its steps, so many where it brings no plan.

    `sums` gets the mismatch between engine and learner, and what the teacher read; `state` is the algorithm's, `memory`
    that of earlier claims by prompt. Raises what `Learner.train_claim` does.
    """
    learner = parts.config.learner
    rewards = total_rewards(claim, parts.config.reward, memory)
    filtered = groups_left_out(claim, rewards.task, learner)
    kept, portions = np.where(filtered, 0, claim.count(Mask.TRAINABLE)), claim.episode_shares()
    reads = parts.algorithm.needs or needed_columns(parts.algorithm, learner) - {EXPERTS} or parts.scorers
    scored = ~filtered & (claim.count(Mask.GENERATED) > 0) if reads else None
    plans = plan_claim(learner, claim, kept, steps=steps, quadratic=parts.quadratic, scored=scored)
    kept_tokens = Kept(read)
    micros = load_steps(learner, claim, kept_tokens, plans, portions, rank=parts.rank, device=parts.device)
    micros, told = _scored(parts, claim, micros, kept_tokens, rewards)
    _require_columns(needed_columns(parts.algorithm, learner), micros)
    scores = _reference(parts, claim, micros, sums)
    micros, given = give_credit(
        parts.algorithm,
        learner,
        claim,
        rewards,
        filtered=filtered,
        plans=plans,
        steps=micros,
        scores=_taught(parts, micros, scores, sums),
        state=state,
    )
    anchors = _anchors(learner, micros, scores)
    out = {"filter": filtered, "veto": np.zeros_like(filtered)}
    weighed: list[Weighed] = []
    if learner.veto:
        plans, micros, out["veto"] = veto_sequences(plans, micros, anchors, kept, portions, parts.device)
    if learner.importance_weights != "none":
        pairs = [weigh(step, own, learner, parts.device) for step, own in zip(micros, anchors, strict=True)]
        micros, weighed = [step for step, _ in pairs], [total for _, total in pairs]
    return Ready(
        plans=plans,
        steps=micros,
        anchors=anchors,
        left_out=out,
        weighed=weighed,
        rewards=rewards,
        given=given,
        scored=told,
    )


def plan_claim(
    learner: LearnerConfig, claim: Claim, counts: Int64, *, steps: int, quadratic: float, scored: Bool | None = None
) -> list[StepPlan]:
    """`plan_iteration` with the settings of the learner."""
    return plan_iteration(
        claim,
        counts=counts,
        steps=steps,
        ranks=learner.num_ranks // learner.context_parallel,
        tokens_per_microbatch=learner.tokens_per_microbatch,
        packing=learner.packing,
        scored=scored,
        quadratic=quadratic,
    )


def load_steps(
    learner: LearnerConfig,
    claim: Claim,
    read: ReadTokens,
    plans: list[StepPlan],
    weights: Float64,
    *,
    rank: int,
    device: torch.device,
) -> Steps:
    """The micro-batches of a rank on its device, without credit."""
    steps = pack_rank(claim, read, plans, rank=rank // learner.context_parallel, packing=learner.packing)
    return [
        [
            Tensors.of(micro, weights=weights, version=claim.version, iteration=claim.iteration, device=device)
            for micro in micros
        ]
        for micros in steps
    ]


def needed_columns(algorithm: Algorithm, learner: LearnerConfig) -> frozenset[str]:
    """Extra columns of tokens that an algorithm reads, by itself or as a teacher's."""
    named = set(algorithm.columns) | ({EXPERTS} if learner.router_replay else set())
    if algorithm.alternatives is not None:
        named.add(algorithm.alternatives)
    if algorithm.needs & FROM_TEACHER and learner.teacher is None:
        named |= {TEACHER, TOP_IDS, TOP_LOGPROBS} if "top" in algorithm.needs else {TEACHER}
    return frozenset(named)


def _require_columns(names: frozenset[str], steps: Steps) -> None:
    for micro in (micro for micros in steps for micro in micros if len(micro.trajectories)):
        missing = sorted(names - micro.columns.keys())
        if missing:
            known = ", ".join(sorted(micro.columns)) or "none"
            raise ValueError(
                f"the algorithm reads the extra column {missing[0]!r}, which no token of the claim has (there is "
                f"{known}): whoever generates has to give it, as `extra` of an append, or a scorer of learner.scorers "
                "(of a teacher the likeliest tokens, too, if its settings have `top: 16`)"
            )
        told = micro.columns.get(TEACHER) if TEACHER in names else None
        if told is not None and np.isnan(told).any():
            raise ValueError(
                f"{int(np.isnan(told).sum())} of {len(told)} tokens of a micro-batch have no value in the column "
                f"{TEACHER!r}: their trajectories were complete before the run had that scorer; begin a new run"
            )


def _scored(
    parts: Parts, claim: Claim, steps: Steps, kept: Kept, rewards: TotalRewards
) -> tuple[Steps, dict[str, float]]:
    """The micro-batches with the columns of the scorers that run at the claim, and what these tell."""
    if not parts.scorers:
        return steps, {}

    outcome = kept.outcome(claim, rewards=rewards.task, correct=rewards.correct, add=sum_in_place)
    with parts.spans.span("reference", iteration=claim.iteration):
        columns, own = parts.scorers.run(kept.batch(claim), outcome)
    shared = [value / num_across() for value in all_sum(list(own.values()), parts.device)]
    start = 0
    filled: Steps = []
    for micros in steps:
        filled.append([])
        for micro in micros:
            if len(micro.trajectories):
                end = start + len(micro.targets)
                given = {name: values[start:end] for name, values in columns.items()}
                micro, start = replace(micro, columns={**micro.columns, **given}), end
            filled[-1].append(micro)
    return filled, dict(zip(own, shared, strict=True))


def _reference(parts: Parts, claim: Claim, steps: Steps, sums: Sums) -> list[list[TokenScores]]:
    """What pi_i says of the whole claim, before the first step; where nobody asks, what the engine recorded."""
    needs, anchor = parts.algorithm.needs, parts.config.learner.anchor
    if anchor == "behavior" and not needs & FROM_REFERENCE:
        return [[TokenScores(micro.behavior, torch.zeros_like(micro.behavior)) for micro in own] for own in steps]
    with parts.spans.span("reference", iteration=claim.iteration):
        top = TOP if "top" in needs else 0
        at = TOP_IDS if top and parts.teacher is None else None
        scores = [reference_pass(parts.policy, own, flow="entropy_flow" in needs, top=top, at=at) for own in steps]
        if anchor != "behavior":
            pairs = [(micro, own.logprobs) for micro, own in zip(chain(*steps), chain(*scores), strict=True)]
            sums.mismatch = over_ranks(added(StepSums, (mismatch_sums(*pair) for pair in pairs)), parts.device)
            sums.by_age = mismatch_by_age(pairs, parts.device)
    return scores


def _taught(
    parts: Parts, steps: Steps, scores: list[list[TokenScores]], sums: Sums
) -> list[list[tuple[TokenScores, TokenScores | None]]]:
    """The scores of pi_i, each with those of the teacher if there is one."""
    teacher = parts.teacher
    if teacher is None:
        taught = bool(parts.algorithm.needs & FROM_TEACHER)

        def with_columns(micro: Tensors, own: TokenScores) -> tuple[TokenScores, TokenScores | None]:
            return own, _told(micro, own) if taught and len(micro.trajectories) else None

        return [list(map(with_columns, *pair)) for pair in zip(steps, scores, strict=True)]
    with parts.spans.span("reference"):
        found = [teacher_pass(teacher, micros, own) for micros, own in zip(steps, scores, strict=True)]
    read = sum(micro.tokens.numel() for micros in steps for micro in micros if len(micro.trajectories))
    sums.teacher_tokens += int(all_sum([float(read)], parts.device)[0])
    return [list(zip(*pair, strict=True)) for pair in zip(scores, found, strict=True)]


def _told(micro: Tensors, scores: TokenScores) -> TokenScores:
    """What the scorer `teacher` said of the tokens, from its columns."""

    def column(name: str) -> Tensor:
        return torch.from_numpy(micro.columns[name].astype(np.float32)).to(micro.targets.device)

    top = None if scores.top is None else column(TOP_LOGPROBS)
    return TokenScores(column(TEACHER), torch.zeros_like(scores.logprobs), top=scores.top, top_logprobs=top)


def _anchors(learner: LearnerConfig, steps: Steps, scores: list[list[TokenScores]]) -> list[list[Tensor]]:
    """The log-probs that the policy is compared with."""
    if learner.anchor == "behavior":
        return [[micro.behavior for micro in micros] for micros in steps]
    return [[own.logprobs for own in step] for step in scores]
