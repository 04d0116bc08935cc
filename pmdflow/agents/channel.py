"""From the gateway to rollout actors, which answer many requests in one call, each when it is ready."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from pmdflow.agents.desk import Incoming, Outgoing

if TYPE_CHECKING:
    from ray.actor import ActorHandle

POLL_S = 5.0
"""How long a call waits for answers."""


class WorkerGone(Exception):
    """The rollout actor does not live any more."""


class Channels:
    """One for each rollout actor that is asked; used by one event loop."""

    def __init__(self, gateway: str) -> None:
        """Nobody is asked yet; `gateway` tells this one from those before it."""
        self._gateway = gateway
        self._by_worker: dict[str, _Channel] = {}

    async def ask(self, worker: str, incoming: Incoming) -> Outgoing:
        """The answer to a request.

        Raises:
            WorkerGone: the rollout actor of this name is dead.
        """
        channel = self._by_worker.get(worker)
        if channel is None:
            try:
                actor = await asyncio.to_thread(ray.get_actor, worker)
            except ValueError:
                raise WorkerGone(worker) from None
            channel = self._by_worker.setdefault(worker, _Channel(actor, self._gateway))
        try:
            return await channel.ask(incoming)
        except RayError:
            self._by_worker.pop(worker, None)
            raise WorkerGone(worker) from None

    def deliver(self, worker: str, incoming: Incoming) -> None:
        """Tell it that an answer was read; it is not waited for."""
        channel = self._by_worker.get(worker)
        if channel is not None:
            channel.deliver(incoming)


class _Channel:
    def __init__(self, actor: ActorHandle[Any], gateway: str) -> None:
        self._actor: Any = actor
        self._gateway = gateway
        self._open: dict[str, asyncio.Future[Outgoing]] = {}
        self._polling: asyncio.Task[None] | None = None

    async def ask(self, incoming: Incoming) -> Outgoing:
        answer: asyncio.Future[Outgoing] = asyncio.get_running_loop().create_future()
        self._open[incoming.id] = answer
        try:
            await _answer(self._actor.submit_requests.remote([incoming]))
            if self._polling is None or self._polling.done():
                self._polling = asyncio.create_task(self._poll())
            return await answer
        finally:
            self._open.pop(incoming.id, None)

    def deliver(self, incoming: Incoming) -> None:
        with suppress(RayError):
            self._actor.submit_requests.remote([incoming])

    async def _poll(self) -> None:
        """Take answers as long as somebody waits; those of a gateway before this one are nobody's."""
        try:
            while self._open:
                for outgoing in await _answer(self._actor.take_answers.remote(POLL_S, self._gateway)):
                    waiting = self._open.get(outgoing.id)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(outgoing)
        except RayError as error:
            for waiting in self._open.values():
                if not waiting.done():
                    waiting.set_exception(error)


async def _answer(ref: Any) -> Any:
    return await ref
