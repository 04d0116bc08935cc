"""Where the gateway's calls and the generating thread of one rollout actor meet."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from pmdflow.agents.answers import error
from pmdflow.agents.requests import Delivered, Posted, TurnRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """One HTTP request of a program."""

    id: str
    """Made by the gateway; its answer has it too."""
    trajectory: int
    epoch: int
    """Of the program's credential."""
    content: TurnRequest | Posted | Delivered


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """What an HTTP request is answered with."""

    id: str
    status: int
    body: Mapping[str, Any]


_Program: TypeAlias = "tuple[int, int]"
"""Trajectory and epoch."""


class Desk:
    """Requests in, answers out. Nothing waits but `take_answers`, and nothing is kept of programs that are gone."""

    def __init__(self) -> None:
        """Nobody is known yet."""
        self._changed = threading.Condition()
        self._waiting: defaultdict[_Program, list[Incoming]] = defaultdict(list)
        self._known: set[_Program] = set()
        self._answers: list[Outgoing] = []
        self._gateways: list[str] = []
        """Those that have asked for answers; only the newest lives."""
        self._arrival: Future[None] = Future()

    @property
    def arrival(self) -> Future[None]:
        """Done once something has arrived since this was asked for."""
        with self._changed:
            if self._arrival.done():
                self._arrival = Future()
            return self._arrival

    def open(self, trajectory: int, epoch: int) -> None:
        """Take requests of a program from now on."""
        with self._changed:
            self._known.add((trajectory, epoch))

    def close(self, trajectory: int, epoch: int) -> None:
        """Take no more of its requests; those that nobody took are refused."""
        with self._changed:
            self._known.discard((trajectory, epoch))
            for incoming in self._waiting.pop((trajectory, epoch), []):
                if not isinstance(incoming.content, Delivered):
                    self._answers.append(_gone(incoming))
            self._changed.notify_all()

    def submit(self, requests: Iterable[Incoming]) -> None:
        """Leave requests for the generating thread."""
        with self._changed:
            for incoming in requests:
                program = (incoming.trajectory, incoming.epoch)
                if program in self._known:
                    self._waiting[program].append(incoming)
                elif not isinstance(incoming.content, Delivered):
                    self._answers.append(_gone(incoming))
            if not self._arrival.done():
                self._arrival.set_result(None)
            self._changed.notify_all()

    def take(self, trajectory: int, epoch: int) -> list[Incoming]:
        """What has arrived of a program."""
        with self._changed:
            return self._waiting.pop((trajectory, epoch), [])

    def answer(self, answers: Iterable[Outgoing]) -> None:
        """Leave answers for the gateway."""
        with self._changed:
            self._answers += answers
            self._changed.notify_all()

    def take_answers(self, wait_s: float, gateway: str) -> list[Outgoing]:
        """What is answered; waits up to `wait_s` for the first one.

        A call of a `gateway` that another one has come after takes nothing: it was killed, and its call goes on.
        """
        with self._changed:
            if gateway not in self._gateways:
                self._gateways.append(gateway)
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._answers or self._gateways[-1] != gateway, timeout=wait_s)
            if self._gateways[-1] != gateway:
                return []
            taken, self._answers = self._answers, []
        return taken


def _gone(incoming: Incoming) -> Outgoing:
    message = f"episode {incoming.trajectory}: this program is not wanted: it ended, or another took its place"
    return Outgoing(id=incoming.id, status=410, body=error(message, kind="session_over"))
