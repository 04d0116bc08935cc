"""The trajectories that one engine generates for, from lease to end, whoever stores their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress

from pmdflow.environments.protocol import Reply
from pmdflow.rollout.ahead import Ahead
from pmdflow.rollout.engine import Output, RolloutEngine
from pmdflow.rollout.held import HeldTrajectory, LeaseLost
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.store.episodes import TurnNote
from pmdflow.types import Grant, Lease, Segment

CALL_WAIT_S = 0.02
"""How long a caller without anything to decode waits for environments at a time."""


class Holder:
    """Moves held trajectories between leases, engine, environments and segments; all calls come from one thread.

    The engine holds exactly the trajectories that are generating. What is generated leaves in `segments`; it goes on
    when `resume` brings the answers to them, so that nothing is built on tokens that are not durable.

    Example:
        >>> holder = Holder(engine, LeaseTaker(config))
        >>> for lease in store.lease("rollout-0/1", engine.version, engine.num_slots, 0.0):
        ...     holder.join(lease, grant=lease.grant)
        >>> while len(holder):
        ...     holder.fill_slots()
        ...     holder.step()
        ...     holder.take_answers()
        ...     holder.resume(store.append(holder.segments(next_version=engine.version))[1])
    """

    def __init__(self, engine: RolloutEngine, taker: LeaseTaker) -> None:
        """Hold nothing yet."""
        self._engine = engine
        self._taker = taker
        self._held: dict[int, HeldTrajectory] = {}
        self._ahead = Ahead(engine)

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[HeldTrajectory]:
        return iter(self._held.values())

    def __contains__(self, id: object) -> bool:
        return id in self._held

    def __getitem__(self, id: int) -> HeldTrajectory:
        return self._held[id]

    @property
    def num_open(self) -> int:
        """Trajectories that may still generate: those that are over wait only for their last append."""
        return sum(held.stop is None for held in self._held.values())

    @property
    def num_calling(self) -> int:
        """Trajectories that wait for their environment."""
        return sum(held.phase == "calling" for held in self._held.values())

    @property
    def context_tokens(self) -> int:
        """Tokens in the contexts of those that generate, prompts included."""
        generating = (held for held in self._held.values() if held.phase == "generating")
        return sum(len(held.lease.prompt) + len(held.context) for held in generating)

    @property
    def urgent(self) -> bool:
        """Something unsent is to be sent at once."""
        return any(held.urgent for held in self._held.values())

    def join(self, lease: Lease, *, grant: int) -> None:
        """Hold a leased trajectory, of which `grant` tokens may be generated; an older lease of it is forgotten."""
        if lease.trajectory in self and (session := self.drop(lease.trajectory).session) is not None:
            session.close("its lease has ended, and was given out again")
        with suppress(LeaseLost):
            self._held[lease.trajectory] = self._taker.take(lease, limit=grant, version=self._engine.version)

    def fill_slots(self) -> int:
        """Give the engine what waits for it, oldest lease first; then what its programs ask for besides.

        Returns:
            Tokens that were generated ahead, and are kept now.
        """
        kept = sum(self._ahead.feed(held, version=self._engine.version) for held in self._waiting())
        free = self._engine.num_slots - sum(held.phase == "generating" for held in self._held.values())
        waiting = self._waiting()[:free]
        self._ahead.stop(len(waiting) + self._ahead.num_running - free)
        for held in waiting:
            self._engine.add(held.begin())
        self._ahead.fill(self._held.values(), free - len(waiting) - self._ahead.num_running)
        return kept

    def forget_ahead(self) -> None:
        """Throw away what was generated before its turn, under weights that go."""
        self._ahead.forget()

    def step(self) -> int:
        """One step of the engine; how many tokens are kept."""
        return self.take(self._engine.step())

    def take(self, outputs: Iterable[Output]) -> int:
        """Take what the engine gave out; how many tokens are kept."""
        kept = 0
        for output in outputs:
            if self._ahead.take(output):
                continue
            held = self._held[output.id]
            kept += held.take(output, version=self._engine.version)
            if held.phase != "generating":
                self._engine.abort(output.id)
        return kept

    def take_answers(self) -> dict[int, Reply]:
        """What environments have answered, by trajectory; those go on once that is durable."""
        answers = {held.id: held.poll() for held in self._held.values()}
        for id, reply in answers.items():
            if reply is not None and self._held[id].stop is not None:
                self._engine.abort(id)
        return {id: reply for id, reply in answers.items() if reply is not None}

    def forks(self) -> list[HeldTrajectory]:
        """Those of which a branch is to be begun in the store before their next segment."""
        return [held for held in self._held.values() if held.fork is not None]

    def wait_answer(self) -> None:
        """Wait a little for the next answer of an environment."""
        calls = [held.call for held in self._held.values()]
        wait([call for call in calls if call is not None], timeout=CALL_WAIT_S, return_when=FIRST_COMPLETED)

    def segments(self, *, next_version: int, urgent: bool = False) -> list[Segment]:
        """A segment of each trajectory, or of the urgent ones, with everything unsent and, if it is over, its end.

        An empty one renews the lease. `next_version` is the version that further tokens will be generated under.
        """
        sent = [held for held in self._held.values() if held.urgent or not urgent]
        for held in sent:
            if held.end_repetition():
                self._engine.abort(held.id)
        version = self._engine.version
        return [held.segment(version=version, next_version=next_version) for held in sent]

    def notes(self) -> list[TurnNote]:
        """What was said of episodes since the last call; it goes to the store before the next segments."""
        notes: list[TurnNote] = []
        for held in self._held.values():
            notes += [(held.id, held.epoch, note.number, dict(note.rewards), note.key) for note in held.notes]
            held.notes.clear()
        return notes

    def resume(self, grants: Iterable[Grant]) -> list[HeldTrajectory]:
        """Go on with what the store answered to the last segments.

        Returns:
            The trajectories that are let go: ended, given back or fenced.
        """
        gone = []
        for grant in grants:
            held = self._held[grant.trajectory]
            if grant.stale or held.phase == "closed":
                gone.append(self.drop(grant.trajectory))
                continue
            held.resume(grant=grant.tokens)
            if held.phase == "generating":
                self._engine.extend(held.id, held.allowed)
            elif held.phase == "over":
                self._engine.abort(held.id)
        return gone

    def abort(self) -> None:
        """Give every lease back with the next segments."""
        for held in self._held.values():
            held.abort()
            self._engine.abort(held.id)

    def close_environments(self) -> list[str]:
        """Close all that were begun, wherever they stand, and wait; which did not end in time."""
        return self._taker.close_environments()

    def drop(self, id: int) -> HeldTrajectory:
        """Forget a trajectory."""
        self._engine.abort(id)
        self._ahead.forget(id)
        return self._held.pop(id)

    def _waiting(self) -> list[HeldTrajectory]:
        return [held for held in self._held.values() if held.phase == "waiting" and held.limit > 0]
