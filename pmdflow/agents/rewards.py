"""What a program says of its episode: durable before it is answered, and each name once, however often it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pmdflow.agents.answers import error
from pmdflow.agents.desk import Desk, Incoming, Outgoing
from pmdflow.agents.requests import Posted

MAX_NAMES = 64
"""Rewards of one episode."""


@dataclass(slots=True)
class Rewards:
    """Of one episode. Whoever sends the same again, after a lost answer or a death, changes nothing."""

    desk: Desk
    durable: dict[str, float] = field(default_factory=dict)
    """In the store, by name: what was said first stands."""
    num_notes: int = 0
    """Notes of the episode that the store has."""
    problems: list[str] = field(default_factory=list, init=False)
    """What else was said, and does not stand."""
    unsaid: dict[str, float] = field(default_factory=dict, init=False)
    """For the next note."""
    _before: frozenset[str] = field(init=False)
    """Said by a program before this one, which may have found something else."""
    _posted: list[Incoming] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._before = frozenset(self.durable)

    def post(self, incoming: Incoming) -> None:
        """Take a request of the program; `noted` answers it."""
        assert isinstance(incoming.content, Posted)
        given = incoming.content.rewards
        known = {**self.durable, **self.unsaid}
        other = [name for name in given.keys() & known.keys() - self._before if given[name] != known[name]]
        if other:
            name = min(other)
            why = f"{name!r} of this episode is {known[name]} already, not {given[name]}: say each reward once, by name"
            self._refuse(incoming, 400, why)
        elif len(given.keys() | known.keys()) > MAX_NAMES:
            self._refuse(incoming, 400, f"an episode has at most {MAX_NAMES} rewards")
        else:
            self._add(given)
            self._posted.append(incoming)

    def end(self, returned: Mapping[str, float]) -> None:
        """The program has ended, and left these."""
        if len(returned.keys() | self.durable.keys() | self.unsaid.keys()) > MAX_NAMES:
            self.problems.append(f"its reward file is not used: an episode has at most {MAX_NAMES} rewards")
        else:
            self._add(returned)

    def noted(self, *, stale: bool) -> None:
        """`unsaid` is durable, or, if `stale`, the lease was lost before."""
        if not stale and self.unsaid:
            self.durable |= self.unsaid
            self.num_notes += 1
        self.unsaid = {}
        posted, self._posted = self._posted, []
        for incoming in posted:
            if stale:
                self._refuse(incoming, 410, "another actor goes on with the episode", kind="session_over")
            else:
                body = {"rewards": dict(self.durable)}
                self.desk.answer([Outgoing(id=incoming.id, status=200, body=body)])

    @property
    def pending(self) -> bool:
        """Something is to be made durable, or somebody waits for an answer."""
        return bool(self.unsaid or self._posted)

    def close(self, why: str) -> None:
        """Refuse whoever waits."""
        for incoming in self._posted:
            self._refuse(incoming, 410, f"the episode is over: {why}", kind="session_over")
        self._posted = []

    def _add(self, given: Mapping[str, float]) -> None:
        known = {**self.durable, **self.unsaid}
        self.unsaid |= {name: value for name, value in given.items() if name not in known}
        for name, value in given.items():
            if known.get(name, value) != value:
                self.problems.append(f"reward {name!r} was {known[name]} before, which stands; now it is {value}")

    def _refuse(self, incoming: Incoming, status: int, why: str, *, kind: str = "invalid_request_error") -> None:
        self.desk.answer([Outgoing(id=incoming.id, status=status, body=error(why, kind=kind))])
