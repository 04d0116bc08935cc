"""All that comes before the first step of a claim: plan, reference pass, teacher, credit, veto, importance weights."""

from __future__ import annotations

from dataclasses import dataclass
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
from pmdflow.learner.selection import Weighed, groups_left_out, veto_sequences, weigh
from pmdflow.learner.steps import Tensors, mismatch_sums, reference_pass, teacher_pass
from pmdflow.learner.sums import StepSums, Sums, added, all_sum, over_ranks
from pmdflow.learner.token_scores import TokenScores
from pmdflow.learner.view import FROM_REFERENCE, TOP, State
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
    reads = parts.algorithm.needs or parts.algorithm.columns
    scored = ~filtered & (claim.count(Mask.GENERATED) > 0) if reads else None
    plans = plan_claim(learner, claim, kept, steps=steps, quadratic=parts.quadratic, scored=scored)
    micros = load_steps(learner, claim, read, plans, portions, rank=parts.rank, device=parts.device)
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
        plans=plans, steps=micros, anchors=anchors, left_out=out, weighed=weighed, rewards=rewards, given=given
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
        [Tensors.of(micro, weights=weights, version=claim.version, device=device) for micro in micros]
        for micros in steps
    ]


def _reference(parts: Parts, claim: Claim, steps: Steps, sums: Sums) -> list[list[TokenScores]]:
    """What pi_i says of the whole claim, before the first step; where nobody asks, what the engine recorded."""
    needs, anchor = parts.algorithm.needs, parts.config.learner.anchor
    if anchor == "behavior" and not needs & FROM_REFERENCE:
        return [[TokenScores(micro.behavior, torch.zeros_like(micro.behavior)) for micro in own] for own in steps]
    with parts.spans.span("reference", iteration=claim.iteration):
        top = TOP if "top" in needs else 0
        scores = [reference_pass(parts.policy, own, flow="entropy_flow" in needs, top=top) for own in steps]
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
        return [[(own, None) for own in step] for step in scores]
    with parts.spans.span("reference"):
        found = [teacher_pass(teacher, micros, own) for micros, own in zip(steps, scores, strict=True)]
    read = sum(micro.tokens.numel() for micros in steps for micro in micros if len(micro.trajectories))
    sums.teacher_tokens += int(all_sum([float(read)], parts.device)[0])
    return [list(zip(*pair, strict=True)) for pair in zip(scores, found, strict=True)]


def _anchors(learner: LearnerConfig, steps: Steps, scores: list[list[TokenScores]]) -> list[list[Tensor]]:
    """The log-probs that the policy is compared with."""
    if learner.anchor == "behavior":
        return [[micro.behavior for micro in micros] for micros in steps]
    return [[own.logprobs for own in step] for step in scores]
