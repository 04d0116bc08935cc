"""The learner ranks as one: every rank gets the same calls in the same order, and one death is the death of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from ray import ObjectRef
from ray.actor import ActorHandle

from pmdflow.errors import ActorDied, LearnerDied
from pmdflow.learner.actor import LearnerActor
from pmdflow.run.supervision import Supervisor
from pmdflow.store.client import call

CALL_TIMEOUT_S = 600.0

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class LearnerGroup:
    """All ranks of the learner.

    Example:
        >>> loads = learners.call(LearnerActor.load_initial)             # doctest: +SKIP
        >>> learners.wait(loads, what="loading the initial weights")    # doctest: +SKIP
    """

    def __init__(self, *, supervisor: Supervisor, start: Callable[[], list[ActorHandle[LearnerActor]]]) -> None:
        """Begin without ranks; `start` creates one actor a rank."""
        self._supervisor = supervisor
        self._start = start

    def restart(self) -> None:
        """Kill what there is of the ranks and start new ones."""
        self._supervisor.stop_learners()
        self._supervisor.learners = self._start()

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
