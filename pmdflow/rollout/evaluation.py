"""A rollout actor's part in evaluation: it keeps one policy version and generates nothing else until that is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Ended: TypeAlias = Literal["done", "late", "passed"]
"""How it ended: nothing is left to lease; the time is over; or the engine has another version, or shall serve one."""


@dataclass(slots=True)
class _Turn:
    version: int
    hold_s: float
    deadline: float | None = None
    """Monotonic second; None until it begins."""
    ended: Ended | None = None


class EvaluationTurns:
    """Between the thread of the controller, which asks and waits, and the generating one, which begins and ends.

    Example:
        >>> turns = EvaluationTurns()
        >>> waiting = threading.Thread(target=turns.serve, args=(3,), kwargs={"hold_s": 60.0})
        >>> waiting.start()
        >>> while not turns.begins(3):
        ...     pass
        >>> turns.active, turns.ends(is_idle=True), turns.active
        (True, True, False)
        >>> waiting.join()
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody has asked."""
        self._clock = clock
        self._changed = threading.Condition()
        self._turn: _Turn | None = None
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether a version is being evaluated now."""
        turn = self._turn
        return turn is not None and turn.deadline is not None

    def serve(self, version: int, *, hold_s: float) -> Ended:
        """Ask for `version` to be evaluated, once the engine has it and for at most `hold_s`; waits for the end.

        What was asked before, and has not begun, is not served any more.
        """
        turn = _Turn(version, hold_s)
        with self._changed:
            if self._turn is not None:
                self._end("passed")
            self._turn = turn
            self._changed.wait_for(lambda: self._closed or turn.ended is not None)
            return turn.ended or "passed"

    def begins(self, version: int) -> bool:
        """Whether evaluation begins now that the engine generates by `version`; it is `active` then."""
        with self._changed:
            turn = self._turn
            if turn is None or turn.deadline is not None or version < turn.version:
                return False
            if version > turn.version:
                self._end("passed")
                return False
            turn.deadline = self._clock() + turn.hold_s
            return True

    def ends(self, *, is_idle: bool) -> bool:
        """Whether evaluation ends now: nothing is held or to be had, or its time is over."""
        with self._changed:
            turn = self._turn
            if turn is None or turn.deadline is None:
                return False
            is_late = self._clock() > turn.deadline
            if is_idle or is_late:
                self._end("done" if is_idle else "late")
            return is_idle or is_late

    def close(self) -> None:
        """Let everybody who waits return."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _end(self, how: Ended) -> None:
        assert self._turn is not None
        self._turn.ended, self._turn = how, None
        self._changed.notify_all()
