"""New weights on their way from the thread that fetches them to the thread that generates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from pmdflow.errors import WaitTimeout

LOOK_S = 0.5


class IncomingWeights:
    """Holds the version that was offered last, is staged and not in use; one before it that nobody took is forgotten.

    An older version than the newest is not taken any more, unless versions may come in any order.

    Example:
        >>> incoming = IncomingWeights()
        >>> incoming.offer(3, "staged")
        >>> incoming.take()
        (3, 'staged')
        >>> incoming.mark_applied(3)
        >>> incoming.await_applied(3, timeout_s=0.0)
        True
    """

    def __init__(self, *, any_order: bool = False) -> None:
        """Nothing is offered; version 0, that of the model folder, is in use."""
        self._any_order = any_order
        self._changed = threading.Condition()
        self._staged: tuple[int, Any] | None = None
        self._offered = 0
        self._applied = 0
        self._closed = False

    @property
    def waiting(self) -> bool:
        """Whether a version can be taken."""
        return self._staged is not None

    def offer(self, version: int, staged: Any) -> None:
        """Let the generating thread take a version, unless a newer one was offered before, or it was offered last."""
        with self._changed:
            if version > self._offered or (self._any_order and version != self._offered):
                self._staged, self._offered = (version, staged), version
                self._changed.notify_all()

    def take(self) -> tuple[int, Any] | None:
        """The offered version and its weights as the engine staged them; None if there is none."""
        with self._changed:
            taken, self._staged = self._staged, None
        return taken

    def mark_applied(self, version: int) -> None:
        """The engine generates with `version` from now on."""
        with self._changed:
            self._applied = version
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is taken any more: let everybody who waits return."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def await_offer(self, *, timeout_s: float, meanwhile: Callable[[], object]) -> None:
        """Wait until a version is offered, or this object closed; call `meanwhile` every `LOOK_S` until then.

        Raises:
            WaitTimeout: none of that came about within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = min(LOOK_S, max(deadline - time.monotonic(), 0.0))
            with self._changed:
                if self._changed.wait_for(lambda: self._closed or self._staged is not None, timeout=left_s):
                    return
            if time.monotonic() > deadline:
                raise WaitTimeout(f"no policy version was published within {timeout_s:g} s")
            meanwhile()

    def await_applied(self, version: int, *, timeout_s: float) -> bool:
        """Wait until an offered version is in use.

        Returns:
            False if another version was offered, or this object closed, before this one was used.

        Raises:
            WaitTimeout: none of that came about within `timeout_s`.
        """

        def is_decided() -> bool:
            return self._closed or self._applied == version or self._offered != version

        with self._changed:
            if not self._changed.wait_for(is_decided, timeout=timeout_s):
                raise WaitTimeout(
                    f"policy version {version} was not in use after {timeout_s:g} s; the engine has {self._applied}"
                )
            return self._applied == version
