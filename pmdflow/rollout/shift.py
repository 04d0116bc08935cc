"""A rollout actor that sleeps while a learner rank has its device: others ask for it, the generating thread does it."""

from __future__ import annotations

import threading

from pmdflow.errors import WaitTimeout
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.rollout.engine import RolloutEngine
from pmdflow.weights.device_turn import DeviceTurn

TURN_TIMEOUT_S = 7200.0
"""A learner has trained an iteration and given the device back within this time."""


class Shift:
    """Whether the engine sleeps, and whether it should.

    Example:
        >>> shift = Shift(turn)              # in the generating thread, before the engine is loaded
        >>> shift.ask(True, timeout_s=60.0)  # in another one
        >>> if shift.is_due:                 # in the generating thread, engine paused, everything sent
        ...     shift.sleep(engine, spans)
    """

    def __init__(self, turn: DeviceTurn) -> None:
        """Be awake, once the device is free.

        Raises:
            WaitTimeout: a learner rank had it for `TURN_TIMEOUT_S`.
        """
        turn.take(timeout_s=TURN_TIMEOUT_S)
        self._turn = turn
        self._changed = threading.Condition()
        self._wanted = False
        self.asleep = False
        """The device's memory is given back."""

    @property
    def is_due(self) -> bool:
        """Whether the engine is to fall asleep, or to wake up."""
        return self._wanted != self.asleep

    def ask(self, asleep: bool, *, timeout_s: float) -> None:
        """Let the engine sleep, or wake, and wait until it does, or until it is asked otherwise.

        Raises:
            WaitTimeout: it did not within `timeout_s`.
        """
        with self._changed:
            self._wanted = asleep
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: asleep in (self.asleep, not self._wanted), timeout=timeout_s):
                what = "fall asleep" if asleep else "wake up"
                raise WaitTimeout(f"the engine did not {what} within {timeout_s:g} s")

    def await_due(self, *, timeout_s: float) -> None:
        """Wait until something is asked for, but not longer than `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_due, timeout=timeout_s)

    def sleep(self, engine: RolloutEngine, spans: SpanBuffer) -> None:
        """Give the device to the learner."""
        with spans.span("offload"):
            engine.sleep()
        self._turn.give()
        self._done(asleep=True)

    def wake(self, engine: RolloutEngine, spans: SpanBuffer) -> None:
        """Have the device again, as soon as the learner has given it back."""
        with spans.span("wait_device"):
            self._turn.take(timeout_s=TURN_TIMEOUT_S)
        with spans.span("offload"):
            engine.wake()
        self._done(asleep=False)

    def _done(self, *, asleep: bool) -> None:
        with self._changed:
            self.asleep = asleep
            self._changed.notify_all()
