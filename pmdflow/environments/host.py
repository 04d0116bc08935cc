"""Where an environment lives: one thread with one event loop, beside everything else."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pmdflow.environments.protocol import Environment

Value = TypeVar("Value")
FAILURES = (Exception, SystemExit, KeyboardInterrupt)
"""What an environment may raise; none of it is more than its own failure."""


class Host:
    """The thread of one environment, which makes it, calls it and closes it; it ends with it."""

    def __init__(self, name: str, *, timeout_s: float, ended: Callable[[Host], None]) -> None:
        """Begin without an environment.

        Args:
            name: In messages.
            timeout_s: Wall-clock limit of each call.
            ended: Told when it is no more.

        Raises:
            OSError: the machine has no file left.
            RuntimeError: it has no thread left.
        """
        self.name = name
        self.environment: Environment | None = None
        self._timeout_s, self._ended = timeout_s, ended
        self._loop = asyncio.new_event_loop()
        self._deadline = time.monotonic() + timeout_s
        self._work: Future[Any] | None = None
        self._is_closing = False
        try:
            threading.Thread(target=self._live, name=f"environment-{name}", daemon=True).start()
        except RuntimeError:
            self._loop.close()
            raise

    @property
    def is_late(self) -> bool:
        """The present call is over its limit."""
        return time.monotonic() > self._deadline

    def submit(self, work: Coroutine[Any, Any, Value]) -> Future[Value]:
        """Run what makes `call`s."""
        self._deadline = time.monotonic() + self._timeout_s
        self._work = asyncio.run_coroutine_threadsafe(work, self._loop)
        return self._work

    async def call(self, method: Callable[..., Value | Awaitable[Value]], **arguments: Any) -> Value:
        """One call of the environment, or of what makes it, with a limit of its own."""
        self._deadline = time.monotonic() + self._timeout_s
        value = method(**arguments)
        return await value if inspect.isawaitable(value) else value

    def close(self) -> None:
        """Close the environment and end; a call that goes on is cancelled, or where it cannot be, comes to its end."""
        if self._is_closing:
            return
        self._is_closing = True
        if self._work is not None:
            self._work.cancel()
        closing = self._close()
        try:
            asyncio.run_coroutine_threadsafe(closing, self._loop)
        except RuntimeError:  # its loop has ended: what it started raised an exit
            closing.close()

    async def _close(self) -> None:
        close = getattr(self.environment, "close", None)
        try:
            if callable(close):
                async with asyncio.timeout(self._timeout_s):
                    await self.call(close)
        except FAILURES:
            pass  # nobody's any more
        finally:
            self._loop.stop()

    def _live(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
            self._ended(self)


class Hosts:
    """Those of one process, so that it does not end before they do."""

    def __init__(self) -> None:
        """Have none yet."""
        self._living: set[Host] = set()
        self._changed = threading.Condition()

    def start(self, name: str, *, timeout_s: float) -> Host:
        """A new one.

        Raises:
            OSError: the machine has no file left.
            RuntimeError: it has no thread left.
        """
        host = Host(name, timeout_s=timeout_s, ended=self._end)
        with self._changed:
            self._living.add(host)
        return host

    def close(self, *, timeout_s: float) -> list[str]:
        """Close all and wait; names of those that did not end within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            for host in self._living:
                host.close()
            while self._living and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return sorted(host.name for host in self._living)

    def _end(self, host: Host) -> None:
        with self._changed:
            self._living.discard(host)
            self._changed.notify_all()
