"""What is added up over micro-batches, ranks and steps, and the metrics made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums:
    """Sums of one optimizer step; those of its micro-batches and ranks add up."""

    loss: float = 0.0
    """Parts of the step's loss."""
    u: float = 0.0
    """Of the trained sequences, as the next three."""
    u_squared: float = 0.0
    sequences: float = 0.0
    generated: float = 0.0
    """Tokens over which u runs."""
    entropy: float = 0.0
    """Of the policy at the generated tokens of trained sequences."""
    entropy_tokens: float = 0.0
    mismatch: float = 0.0
    """log behavior - log learner of tokens of the newest version."""
    mismatch_tokens: float = 0.0
    clipped: float = 0.0
    """Trained tokens with a clipped objective."""
    supervised: float = 0.0
    """Parts of the step's supervised loss."""


@dataclass(slots=True, kw_only=True)
class Sums:
    """What one iteration adds up over its steps."""

    step_losses: list[float] = field(default_factory=list)
    """Loss of each step, 0.0 for a skipped one."""
    max_grad_norm: float
    """What each step's gradient is clipped to."""
    grad_norms: list[float] = field(default_factory=list)
    """Of each step taken, before clipping."""
    skipped: int = 0
    trained_tokens: int = 0
    teacher_tokens: int = 0
    """Tokens that a teacher's forward passes read, over all ranks."""
    lr: float = 0.0
    """Of the last step taken."""
    mismatch: StepSums | None = None
    """The policy that opened the iteration against the engine: later steps have other weights."""
    by_age: list[float | None] | None = None
    """The same over tokens of each age; None without log pi_i."""
    total: StepSums = field(default_factory=StepSums)
    """Over the steps taken."""

    def add(self, step: StepSums, *, norm: float, tokens: int) -> None:
        """Count a step that was taken, of so many trained `tokens`, with its sums over all ranks."""
        self.mismatch = self.mismatch or step
        self.step_losses.append(step.loss)
        self.grad_norms.append(norm)
        self.trained_tokens += tokens
        self.total = added(StepSums, [self.total, step])

    def skip(self) -> None:
        """Count a step without a trained token."""
        self.skipped += 1
        self.step_losses.append(0.0)

    def metrics(self, *, clips: bool, supervised: bool) -> dict[str, Any]:
        """The `learner/*` metrics of the iteration, defined in `pmdflow/metrics/METRICS.md`.

        Args:
            clips: Whether the algorithm has a band, so that the clipped share has a meaning.
            supervised: Whether there is a supervised loss.
        """
        taken, total, mismatch = len(self.grad_norms), self.total, self.mismatch or StepSums()
        mean = total.u / total.sequences if total.sequences else 0.0
        variance = total.u_squared / total.sequences - mean**2 if total.sequences else 0.0
        optional = {}
        if taken and clips:
            optional["learner/clipped_share"] = total.clipped / self.trained_tokens
        if taken and supervised:
            optional["learner/ptx_loss"] = total.supervised / taken
        if self.teacher_tokens:
            optional["learner/teacher_tokens"] = self.teacher_tokens
        return {
            **optional,
            "learner/loss": sum(self.step_losses) / taken if taken else 0.0,
            "learner/step_losses": self.step_losses,
            "learner/grad_norm": sum(self.grad_norms) / taken if taken else 0.0,
            "learner/clip_factors": [min(1.0, self.max_grad_norm / norm) if norm else 1.0 for norm in self.grad_norms],
            "learner/u_mean": mean,
            "learner/u_std": max(variance, 0.0) ** 0.5,
            "learner/reference_kl": -total.u / total.generated if total.generated else 0.0,
            "learner/mismatch_kl": mismatch.mismatch / mismatch.mismatch_tokens if mismatch.mismatch_tokens else None,
            "learner/behavior_kl_by_age": self.by_age,
            "learner/entropy": total.entropy / total.entropy_tokens if total.entropy_tokens else None,
            "learner/trained_tokens": self.trained_tokens,
            "learner/lr": self.lr,
            "learner/skipped_steps": self.skipped,
        }


Given = TypeVar("Given")
Fields = TypeVar("Fields")
"""A dataclass of numbers that can be made from its fields by name."""


def added(kind: type[Fields], parts: Iterable[Fields]) -> Fields:
    """Add dataclasses of numbers field by field, in the order given; zeros if there is none."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    totals = dict.fromkeys(names, 0.0)
    for part in parts:
        for name in names:
            totals[name] += getattr(part, name)
    return kind(**totals)


def over_ranks(local: Fields, device: torch.device) -> Fields:
    """Add a dataclass of numbers over the ranks, in one all-reduce; every rank gets the same."""
    names = [field.name for field in fields(local)]  # type: ignore[arg-type]
    totals = all_sum([getattr(local, name) for name in names], device)
    return type(local)(**dict(zip(names, totals, strict=True)))


def all_sum(values: Iterable[float], device: torch.device) -> list[float]:
    """Add vectors over the ranks, in float64; every rank gets the same numbers."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=_across.group)
    return [float(value) for value in total.tolist()]


def sum_in_place(tensors: Iterable[torch.Tensor]) -> None:
    """Add tensors over the ranks, each into itself."""
    for tensor in tensors:
        dist.all_reduce(tensor, group=_across.group)


def num_across() -> int:
    """Ranks whose rows differ."""
    return dist.get_world_size(_across.group)


def from_ranks(own: Given) -> list[Given]:
    """What every rank gives, by rank."""
    parts: list[Any] = [None] * num_across()
    dist.all_gather_object(parts, own, group=_across.group)
    return parts


@dataclass(slots=True)
class _Across:
    """The ranks of this process whose rows are others; those that share its own add the same."""

    group: Any = None


_across = _Across()


def add_across(group: Any) -> None:
    """Let sums run over the ranks of `group` from here on; None is all of them."""
    _across.group = group
