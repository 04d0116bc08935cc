"""The requests of one episode: which of them are one, however often each is sent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pmdflow.agents.answers import Choice
from pmdflow.agents.history import Target
from pmdflow.agents.requests import TurnRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """A turn that is asked for and has not come to its place in the episode."""

    key: tuple[int, int]
    """Of the request in its episode, and of the sample in the request."""
    history: tuple[int, ...]
    """What the model goes on from, prompt included."""
    limit: int
    """Tokens that it may have."""
    stop: tuple[str, ...]
    """Texts that end it, besides those of the run."""


@dataclass(slots=True, eq=False)
class Asked:
    """A request of a program, which may have come several times."""

    request: TurnRequest
    number: int
    """Of the request in its episode, under this lease."""
    asked_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    waiters: list[str] = field(default_factory=list)
    """HTTP requests that get the answer."""
    attempts: set[int | None] = field(default_factory=set)
    """By the client's count."""
    target: Target | None = None
    choices: list[Choice] = field(default_factory=list)
    body: Mapping[str, Any] | None = None
    """The answer, once it is there."""
    delivered: bool = False
    """Its client has read the answer."""
    early: tuple[int, ...] | None = None
    """What it would go on from if it had come to its place; () where that cannot be said."""

    def add(self, id: str, attempt: int | None) -> None:
        """It has come again, as the HTTP request `id`."""
        self.waiters.append(id)
        self.attempts.add(attempt)


def same(one: TurnRequest, other: TurnRequest) -> bool:
    """Whether they ask for the same; those with a key do so where it is one key."""
    if one.idempotency_key is not None or other.idempotency_key is not None:
        return one.idempotency_key == other.idempotency_key
    return one.content == other.content


def joined(request: TurnRequest, opened: Iterable[Asked], answered: Iterable[Asked]) -> Asked | None:
    """The earlier request that this one is, sent again; None: it is another one.

    What has the key of an earlier request is that one. A client that counts its attempts says so of a first one; each
    later one belongs to a request that it has not been sent for, an open one before those that are answered, of which
    it is none that its client has read. Of a client that does not count, the same while the first is open is that one.
    """
    waiting = [entry for entry in opened if same(entry.request, request)]
    done = [entry for entry in answered if same(entry.request, request)]
    if request.idempotency_key is not None:
        return next(iter([*waiting, *done]), None)
    if not request.attempt:
        return waiting[0] if waiting and request.attempt is None else None
    lost = [*waiting, *(entry for entry in reversed(done) if not entry.delivered)]
    return next((entry for entry in lost if request.attempt not in entry.attempts), lost[0] if lost else None)
