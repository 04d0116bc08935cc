"""One claim -> optimizer steps -> ranks -> micro-batches. NumPy; every rank computes the same plan.

A logit at position t - 1 predicts token t. Only generated tokens are predicted, so a micro-batch carries its
per-token values packed over those: P of them, in the order of its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pmdflow import _rust_buffer
from pmdflow.learner.turns import notes_of, turn_keys, turn_numbers, turn_rewards
from pmdflow.store.plan import in_claim_order
from pmdflow.types import Claim, ClaimRows, ClaimTokens, Float32, Float64, Int32, Int64, Mask, TrainBatch

WHOLE_GROUPS = 1.05
"""Groups stay whole on a rank if the busiest rank then has at most so many times the tokens that it had otherwise."""
BUCKET = 0.6
"""A padded row shorter than this share of the longest begins a new micro-batch: padding costs as much as tokens."""

Bool = npt.NDArray[np.bool_]
Indices = tuple[int, ...]
ReadTokens = Callable[[Int64], ClaimTokens]
"""The tokens of the trajectories at some indices of a claim, packed in that order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One optimizer step: which trajectories each rank computes, and the denominators over all ranks."""

    num_sequences: float
    """Trajectories with a trained token, each by its share of its episode."""
    num_tokens: int
    """Trained tokens."""
    weighted_tokens: float
    """The same, each by the share of its trajectory."""
    ranks: tuple[tuple[Indices, ...], ...]
    """For each rank its micro-batches, equally many; each the indices of its trajectories, empty to keep pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass reads: B sequences, in one row or each right-padded in its own, and P generated tokens."""

    trajectories: Int64
    """Index of each sequence's trajectory [B]; empty for a micro-batch that only keeps pace with the other ranks."""
    tokens: Int64
    """[1, W] if packed, else [B, W] with 0 at padding."""
    lengths: tuple[int, ...]
    """Tokens of each sequence [B]."""
    positions: Int64
    """Where each generated token is predicted: index into the flattened tokens [P]."""
    targets: Int64
    """The generated tokens [P]."""
    temperatures: Float32
    """[P]"""
    behavior: Float32
    """Log-probs at generation [P]."""
    versions: Int32
    """[P]"""
    turns: Int32
    """Turn of its trajectory that each token is of, from 0 [P]: what no observed token interrupts."""
    turn_keys: Int64
    """Of the state in which each token's turn began: what was said of it, or observed since the turn before [P]."""
    turn_rewards: Float64
    """What each token's turn was rewarded with [P]."""
    trained: Bool
    """[P]"""
    columns: Mapping[str, npt.NDArray[Any]]
    """Extra columns by name, each [P, ...]; {} for a micro-batch that only keeps pace."""
    cu_seqlens: Int64
    """Start of each sequence's generated tokens and the end [B + 1]."""
    packed: bool
    """Whether the sequences lie one after another in a single row."""


def group_slices(batch: ClaimRows) -> list[slice]:
    """The trajectories of each group, in claim order.

    Raises:
        ValueError: members of a group are not adjacent.
    """
    starts = [*batch.group_starts().tolist(), len(batch.groups)]
    slices = [slice(first, last) for first, last in itertools.pairwise(starts)]
    if len(slices) != len(np.unique(batch.groups)):
        raise ValueError("the members of a group must be adjacent in a claim: sort trajectories by group")
    return slices


def plan_iteration(
    batch: ClaimRows,
    *,
    counts: Int64,
    steps: int,
    ranks: int,
    tokens_per_microbatch: int,
    packing: bool = True,
    quadratic: float = 0.0,
    scored: Bool | None = None,
) -> list[StepPlan]:
    """Split a claim into steps, ranks and micro-batches.

    Groups stay whole and go to the steps of the claim's plan; a claim without one is dealt to `steps` in claim order.
    Trajectories without a trained token are in no micro-batch: they have no gradient and are in no denominator. Ranks
    get about equally much to compute, and so do the packed micro-batches that run at the same time.

    Args:
        batch: The claim.
        counts: Tokens of each trajectory that have a gradient [N].
        steps: Optimizer steps of a claim that brings no plan.
        ranks: Learner ranks.
        tokens_per_microbatch: Most tokens of a micro-batch, padding included.
        packing: Whether a micro-batch is one row without padding.
        quadratic: A sequence of n tokens costs n + quadratic x n^2, the latter for attention (`Speed.quadratic`).
        scored: Trajectories that are in a micro-batch in any case, trained or not [N]; with it, groups stay whole on a
            rank where balance allows.

    Raises:
        ValueError: one trajectory alone is longer than `tokens_per_microbatch`, or the plan is of another claim.
    """
    lengths, plans = np.diff(batch.cu_seqlens), []
    weighted = batch.episode_shares() * counts
    for dealt in _dealt(batch, steps):
        members = dealt[counts[dealt] > 0]
        computed = members if scored is None else dealt[(counts[dealt] > 0) | scored[dealt]]
        _refuse_longer(lengths[computed], tokens_per_microbatch)
        parts = _spread(computed, lengths, ranks, tokens_per_microbatch, packing=packing, quadratic=quadratic)
        if scored is not None and ranks > 1:
            kept = _whole(parts, batch.groups, lengths, tokens_per_microbatch, packing=packing, quadratic=quadratic)
            parts = kept or parts
        pace = max(len(part) for part in parts)
        plan = StepPlan(
            num_sequences=float(batch.episode_shares()[members].sum()),
            num_tokens=int(counts[members].sum()),
            weighted_tokens=float(weighted[members].sum()),
            ranks=tuple(tuple(part) + ((),) * (pace - len(part)) for part in parts),
        )
        plans.append(plan)
    return plans


def _dealt(batch: ClaimRows, steps: int) -> list[Int64]:
    """The trajectories of each step."""
    slices = group_slices(batch)
    plan = batch.plan or in_claim_order(len(slices), steps)
    if len(plan.steps) != len(slices):
        raise ValueError(
            f"iteration {batch.iteration} has {len(slices)} groups, its plan deals {len(plan.steps)}: it is of another "
            "claim"
        )
    step_of = np.repeat(plan.steps, [group.stop - group.start for group in slices])
    return [np.flatnonzero(step_of == step) for step in range(plan.num_steps)]


def _refuse_longer(lengths: Int64, limit: int) -> None:
    if len(lengths) and lengths.max() > limit:
        raise ValueError(
            f"a trajectory has {lengths.max()} tokens, learner.tokens_per_microbatch is {limit}: raise it to at "
            "least data.max_tokens plus the longest prompt"
        )


def _spread(
    members: Int64, lengths: Int64, num_ranks: int, limit: int, *, packing: bool, quadratic: float
) -> Sequence[Sequence[Indices]]:
    """Micro-batches of each rank; padded ones are cut from one list for each rank, longest first."""
    own = lengths[members]
    most = limit if packing else max(int(own.sum()), 1)
    (ranks,) = _rust_buffer.pack(own.tolist(), ranks=num_ranks, limit=most, quadratic=quadratic)
    filled = [[tuple(members[micro].tolist()) for micro in rank] for rank in ranks]
    if packing:
        return filled
    return [[cut for whole in rank for cut in _fill_padded(whole, lengths, limit)] for rank in filled]


def _whole(
    parts: Sequence[Sequence[Indices]], groups: Int64, lengths: Int64, limit: int, *, packing: bool, quadratic: float
) -> Sequence[Sequence[Indices]] | None:
    """The same trajectories with whole groups on each rank, the longest first; None if that unbalances the ranks."""
    members = np.sort(np.array([row for part in parts for micro in part for row in micro], np.int64))
    costs = lengths + quadratic * lengths.astype(np.float64) ** 2
    busiest = max(sum(float(costs[list(micro)].sum()) for micro in part) for part in parts)
    names, group = np.unique(groups[members], return_inverse=True)
    own_costs = np.bincount(group, weights=costs[members], minlength=len(names))
    loads, rank_of = np.zeros(len(parts)), np.zeros(len(names), np.int64)
    for index in np.argsort(-own_costs, kind="stable"):
        rank_of[index] = np.argmin(loads)
        loads[rank_of[index]] += own_costs[index]
    if loads.max() > WHOLE_GROUPS * busiest:
        return None
    own = [members[rank_of[group] == rank] for rank in range(len(parts))]
    return [_spread(rows, lengths, 1, limit, packing=packing, quadratic=quadratic)[0] for rows in own]


def is_whole(plans: Sequence[StepPlan], groups: Int64) -> bool:
    """Whether all that is computed of a group is computed on one rank."""
    seen: dict[int, int] = {}
    return all(
        seen.setdefault(int(groups[row]), rank) == rank
        for plan in plans
        for rank, micros in enumerate(plan.ranks)
        for micro in micros
        for row in micro
    )


def _fill_padded(members: Sequence[int], lengths: Int64, limit: int) -> list[Indices]:
    """Micro-batches of rows x width <= limit and of similar lengths."""
    filled: list[list[int]] = []
    for member in members:
        widest = int(lengths[filled[-1][0]]) if filled else 0
        if int(lengths[member]) >= BUCKET * widest > 0 and (len(filled[-1]) + 1) * widest <= limit:
            filled[-1].append(member)
        else:
            filled.append([member])
    return [tuple(rows) for rows in filled]


def pack_rank(
    claim: Claim, read: ReadTokens, plans: Sequence[StepPlan], *, rank: int, packing: bool
) -> list[list[MicroBatch]]:
    """The micro-batches of one rank, step by step. It reads its own trajectories, in their order, and no others.

    Args:
        claim: All trajectories, without tokens.
        read: Gives the tokens of the trajectories at some indices.
        plans: Every step.
        rank: Which one.
        packing: Whether a micro-batch is one row without padding.

    Raises:
        ValueError: as `pack`.
    """
    steps = [plan.ranks[rank] for plan in plans]
    own = read(np.array([row for micros in steps for micro in micros for row in micro], np.int64))
    lengths, end = np.diff(claim.cu_seqlens), 0
    packed: list[list[MicroBatch]] = []
    for micros in steps:
        packed.append([])
        for micro in micros:
            rows = np.array(micro, np.int64)
            start, end = end, end + int(lengths[rows].sum())
            extra = {name: values[start:end] for name, values in own.extra.items()}
            tokens = ClaimTokens(tokens=own.tokens[start:end], logprobs=own.logprobs[start:end], extra=extra)
            notes = [(new, *note[1:]) for new, row in enumerate(micro) for note in notes_of(claim.turns, row)]
            batch = replace(claim.batch(rows, tokens), turns=notes)
            trained = (batch.mask & Mask.TRAINABLE) != 0
            filled = pack(batch, trained=trained, trajectories=tuple(range(len(rows))), packing=packing)
            packed[-1].append(replace(filled, trajectories=rows))
    return packed


def pack(batch: TrainBatch, *, trained: Bool, trajectories: Indices, packing: bool = True) -> MicroBatch:
    """Gather the sequences of one micro-batch.

    Raises:
        ValueError: a generated token is the first of its trajectory, so nothing predicts it.
    """
    if not trajectories:
        return _empty(packing)
    starts, ends = batch.cu_seqlens[list(trajectories)], batch.cu_seqlens[[index + 1 for index in trajectories]]
    lengths = ends - starts
    width = int(lengths.sum() if packing else lengths.max())
    tokens = np.zeros((1 if packing else len(trajectories), width), np.int64)
    offsets = np.cumsum(lengths) - lengths if packing else np.arange(len(trajectories)) * width
    sources, positions = [], []
    for trajectory, start, end, offset in zip(trajectories, starts, ends, offsets, strict=True):
        tokens.reshape(-1)[offset : offset + end - start] = batch.tokens[start:end]
        generated = np.flatnonzero(batch.mask[start:end] & Mask.GENERATED)
        if len(generated) and generated[0] == 0:
            raise ValueError(f"trajectory {batch.trajectories[trajectory]} has no prompt: add at least one token")
        sources.append(start + generated)
        positions.append(offset + generated - 1)
    source = np.concatenate(sources)
    return MicroBatch(
        trajectories=np.asarray(trajectories, np.int64),
        tokens=tokens,
        lengths=tuple(lengths.tolist()),
        positions=np.concatenate(positions),
        targets=batch.tokens[source].astype(np.int64),
        temperatures=batch.temperatures[source],
        behavior=batch.logprobs[source],
        versions=batch.versions[source],
        turns=np.concatenate([turn_numbers(part) for part in sources]),
        **_said(batch, trajectories, sources),
        trained=trained[source],
        columns={name: values[source] for name, values in batch.extra.items()},
        cu_seqlens=np.concatenate([[0], np.cumsum([len(part) for part in sources])]).astype(np.int64),
        packed=packing,
    )


def _said(batch: TrainBatch, trajectories: Indices, sources: Sequence[Int64]) -> dict[str, npt.NDArray[Any]]:
    """What environments said of each generated token's turn, from the places of those of each trajectory."""
    keys, rewards = [], []
    for row, generated in zip(trajectories, sources, strict=True):
        start, notes = int(batch.cu_seqlens[row]), notes_of(batch.turns, row)
        said = start + int(batch.prompt_lengths[row])
        keys.append(turn_keys(batch.tokens, start, generated, said=said, notes=notes))
        rewards.append(turn_rewards(generated, said=said, notes=notes))
    return {"turn_keys": np.concatenate(keys), "turn_rewards": np.concatenate(rewards)}


def _empty(packing: bool) -> MicroBatch:
    """One sequence of two tokens, nothing trained: its passes keep the ranks' collectives in step."""
    return MicroBatch(
        trajectories=np.zeros(0, np.int64),
        tokens=np.zeros((1, 2), np.int64),
        lengths=(2,),
        positions=np.zeros(1, np.int64),
        targets=np.zeros(1, np.int64),
        temperatures=np.ones(1, np.float32),
        behavior=np.zeros(1, np.float32),
        versions=np.full(1, -1, np.int32),
        turns=np.zeros(1, np.int32),
        turn_keys=np.zeros(1, np.int64),
        turn_rewards=np.zeros(1),
        trained=np.zeros(1, np.bool_),
        columns={},
        cu_seqlens=np.array([0, 1], np.int64),
        packed=packing,
    )
