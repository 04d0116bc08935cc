"""The learner ranks as one: every rank gets the same calls in the same order, and one death is the death of all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError

from pmdflow.errors import ActorDied, LearnerDied, PmdflowError, WaitTimeout
from pmdflow.learner.actor import LearnerActor
from pmdflow.run.supervision import TICK_S, Supervisor
from pmdflow.store.client import call

CALL_TIMEOUT_S = 600.0
ALIVE_TIMEOUT_S = 20.0
"""A rank answers within this time, whatever it does."""

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class LearnerGroup:
    """All ranks of the learner.

    Example:
        >>> loads = learners.call(LearnerActor.load_initial)             # doctest: +SKIP
        >>> learners.wait(loads, what="loading the initial weights")    # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        start: Callable[[], list[ActorHandle[LearnerActor]]],
        on_device: Callable[[dict[str, Any]], None],
    ) -> None:
        """Begin without ranks; `start` creates one actor a rank, and `on_device` is told of the device of rank 0."""
        self._supervisor = supervisor
        self._start = start
        self._on_device = on_device

    def restart(self) -> None:
        """Kill what there is of the ranks and start new ones.

        Raises:
            LearnerDied: one of the new ones died.
        """
        self._supervisor.stop_learners()
        try:
            self._supervisor.learners = self._start()
        except ActorDied as error:
            raise LearnerDied(str(error)) from error
        device = self.wait(self.call(LearnerActor.device_info)[:1], what="the device of learner rank 0")[0]
        self._supervisor.aside(partial(self._on_device, device), what="noting the learner's device")

    def call(
        self,
        method: Callable[Concatenate[LearnerActor, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> list[ObjectRef[Answer]]:
        """Call a method of every rank; the answers come in the order of the ranks."""
        return [call(learner, method, *args, **kwargs) for learner in self._supervisor.learners]

    def wait(self, refs: Sequence[ObjectRef[Answer]], *, what: str, timeout_s: float = CALL_TIMEOUT_S) -> list[Answer]:
        """Wait for the answers of `call`.

        Raises:
            LearnerDied: a rank died.
            WaitTimeout: they were not all there in time; names `what`.
        """
        try:
            return self._supervisor.wait(refs, what=what, timeout_s=timeout_s)
        except ActorDied as error:
            raise LearnerDied(str(error)) from error
        except WaitTimeout:
            raise
        except PmdflowError as error:  # a peer that is gone fails the others' collectives before Ray knows of its death
            if self._are_all_alive():
                raise
            raise LearnerDied(f"a learner rank does not answer, and another says: {error}") from error

    def _are_all_alive(self) -> bool:
        """Ask every rank for a sign of life, while the others are looked after."""
        asked, deadline = self.call(LearnerActor.device_info), time.monotonic() + ALIVE_TIMEOUT_S
        pending = list(asked)
        while pending and time.monotonic() < deadline:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=TICK_S)
            with suppress(PmdflowError):  # such as the failure that is being judged
                self._supervisor.tick()
        try:
            ray.get(asked, timeout=0)
        except RayError:
            return False
        return True
