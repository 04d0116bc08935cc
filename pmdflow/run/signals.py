"""Signals that end a run early: drained on the first, stopped at once on what comes after it."""

from __future__ import annotations

import os
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

_POLITE = (signal.SIGTERM, signal.SIGHUP)
"""Sent by batch systems and by terminals that close, not by somebody who grows impatient."""


class Drainable(Protocol):
    """What can be asked to drain: a `Supervisor`."""

    draining: bool

    def ask_to_drain(self) -> None:
        """Finish the iteration, save, stop."""


class StopSignals:
    """Ctrl-C drains, and twice stops at once; SIGTERM and SIGHUP drain within a deadline, and then stop at once.

    SIGHUP that is ignored stays ignored: that is how `nohup` lets a run outlive its terminal.

    Example:
        >>> with StopSignals(drain_s=25.0) as signals:       # doctest: +SKIP
        ...     signals.drain(supervisor)
        ...     controller.run()
    """

    def __init__(self, *, drain_s: float) -> None:
        """Listen from `with` on; `drain_s` is the deadline of SIGTERM and SIGHUP."""
        self._drain_s = drain_s
        self._run: Drainable | None = None
        self._deadline: threading.Timer | None = None
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGINT, *_POLITE)}
        self.reason = "stopped at once"
        """Why a `KeyboardInterrupt` was raised."""

    def __enter__(self) -> Self:
        """What is drained is not known yet: until `drain`, every signal stops at once."""
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self.over()
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def drain(self, run: Drainable) -> None:
        """From now on the first signal drains `run`. Ray has taken SIGTERM meanwhile, so it is taken again."""
        self._run = run
        self._listen()

    def over(self) -> None:
        """There is nothing left to drain."""
        self._run = None
        if self._deadline is not None:
            self._deadline.cancel()

    def _listen(self) -> None:
        for number in self._previous:
            if number != signal.SIGHUP or self._previous[number] != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        run = self._run
        if run is None or (run.draining and number == signal.SIGINT):
            raise KeyboardInterrupt
        if number in _POLITE and self._deadline is None:
            self._deadline = threading.Timer(self._drain_s, self._late)
            self._deadline.daemon = True
            self._deadline.start()
        if not run.draining:
            run.ask_to_drain()

    def _late(self) -> None:
        """Be the second Ctrl-C: a signal, because only that wakes a thread that waits."""
        self.reason = f"stopped at once: the drain was not over within run.drain_s ({self._drain_s:g} s)"
        os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def hangup_ignored() -> Iterator[None]:
    """Processes that are started meanwhile ignore SIGHUP, which a closing terminal sends to all of them."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)
