"""Which sequence sits in which slot of the transformers engine, so that decoding reads the cache as views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SlotGroup = tuple[int, int, int]
"""First slot, last slot + 1 and the length of the longest sequence in between."""

_GROUP_BITS = 6
"""Sequences below 2^6 tokens are read together whatever their lengths."""


@dataclass(slots=True)
class HeldSequence:
    """A sequence in the engine; `cached` of its tokens have keys in slot `slot`."""

    id: int
    tokens: list[int]
    limit: int
    remaining: int
    temperature: float
    top_p: float
    slot: int
    cached: int = 0
    min_tokens: int = 0
    """New tokens that none of `stops` may be among."""
    stops: frozenset[int] = frozenset()
    """Ids that end it."""

    @property
    def pending(self) -> int:
        """Tokens to prefill; the last token is the next decode step's input."""
        return len(self.tokens) - 1 - self.cached

    @property
    def ready(self) -> bool:
        """It takes part in the next decode step."""
        return self.limit > 0 and self.pending == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlan:
    """Where every held sequence goes."""

    slots: dict[int, int]
    """Slot of each, by id."""
    groups: list[SlotGroup]
    """Of those that decode."""


def plan_slots(ready: Sequence[HeldSequence], others: Sequence[HeldSequence], *, num_slots: int) -> SlotPlan:
    """Bring the n ready ones into slots 0 to n - 1, those of similar length side by side, with few moves.

    Lengths are grouped by powers of two, at most three groups: few long sequences do not pad the many short ones,
    and a leaving sequence moves at most one other in each group.
    """
    bits = {s.id: s.cached.bit_length() for s in ready}
    least = max([_GROUP_BITS, *(number - 2 for number in bits.values())])
    groups: dict[int, list[HeldSequence]] = {}
    for sequence in ready:
        groups.setdefault(max(least, bits[sequence.id]), []).append(sequence)
    slots: dict[int, int] = {}
    slot_groups: list[SlotGroup] = []
    first = 0
    for number in sorted(groups, reverse=True):
        members = groups[number]
        end = first + len(members)
        slots |= _fill(members, range(first, end))
        slot_groups.append((first, end, max(s.cached + 1 for s in members)))
        first = end
    return SlotPlan(slots=slots | _fill(others, range(first, num_slots)), groups=slot_groups)


def _fill(sequences: Sequence[HeldSequence], slots: range) -> dict[int, int]:
    """Give each sequence one of `slots`, by id; those that are in there stay."""
    staying = {s.id: s.slot for s in sequences if s.slot in slots}
    free = iter(sorted(set(slots) - set(staying.values())))
    return staying | {s.id: next(free) for s in sequences if s.id not in staying}
