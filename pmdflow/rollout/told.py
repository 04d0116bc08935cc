"""What environments and agent programs of one rollout actor did that is to be known."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from pmdflow.config.schema import Config
from pmdflow.environments.protocol import Reply
from pmdflow.errors import PmdflowError
from pmdflow.metrics.report import Event

MAX_EVENTS = 20
"""Problems, and other things, kept between two drains."""


class Told:
    """Keeps events until they are drained, and counts what only fails."""

    def __init__(self, config: Config, worker: str) -> None:
        """Know nothing yet; `worker` names the actor."""
        self._environment, self._worker = config.environment, worker
        self._room = "environment" if config.agents is None else "agent"
        self._problems: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._notes: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._failures: list[str] = []
        """What environments have failed at since one of them answered."""

    def take(self, trajectory: int, reply: Reply) -> None:
        """Keep what an answer says beside itself.

        Raises:
            PmdflowError: environments only fail.
        """
        if reply.notice:
            self._notes.append(self._event("ended", reply.notice, trajectory=trajectory))
        if not reply.problem:
            self._failures.clear()
            return
        self._problems.append(self._event("failed", reply.problem, trajectory=trajectory))
        self._failures.append(reply.problem)
        environment = self._environment
        if environment is not None and len(self._failures) >= environment.max_failures_in_a_row:
            raise PmdflowError(
                f"{len(self._failures)} calls of environment.factory {environment.factory} failed in a row "
                f"(environment.max_failures_in_a_row); the first: {self._failures[0]}",
                hint="mend the environment; what is stored stays, and `pmdflow up` goes on",
            )

    def note(self, events: Iterable[Event]) -> None:
        """Keep what somebody else says."""
        self._notes += events

    def left(self, names: Iterable[str]) -> None:
        """Keep which environments did not end."""
        self._problems += [self._event("failed", f"{name}: it did not end when it was closed") for name in names]

    def drain(self) -> list[Event]:
        """All since the last call."""
        return [kept.popleft() for kept in (self._problems, self._notes) for _ in range(len(kept))]

    def _event(self, what: str, message: str, **attrs: Any) -> Event:
        return Event(kind=f"{self._room}_{what}", message=message, attrs={"actor": self._worker, **attrs})
