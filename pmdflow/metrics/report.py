"""What an actor tells its supervisor when it is asked: the same for every kind of actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened once; a line of `events.jsonl`."""

    kind: str
    message: str
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorReport:
    """What happened in an actor since its last report."""

    spans: Sequence[Mapping[str, Any]]
    """Lines of `spans.jsonl`, oldest first."""
    events: Sequence[Event] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Token counts of a rollout actor since it was made, by name; empty for all others."""
