"""Who has the devices of a colocated run: its engines, or its learner."""

from __future__ import annotations

import time

import ray
from ray import ObjectRef
from ray.exceptions import RayActorError, RayTaskError

from pmdflow.config.schema import Config
from pmdflow.errors import PmdflowError, WaitTimeout
from pmdflow.learner.actor import LearnerActor
from pmdflow.rollout.actor import RolloutActor
from pmdflow.run.learner_group import LearnerGroup
from pmdflow.run.loops import is_ready
from pmdflow.run.supervision import STARTUP_TIMEOUT_S, TICK_S, Supervisor
from pmdflow.store.client import call

SLEEP_TIMEOUT_S = 300.0
"""An engine has sent what it has and emptied its device within this time after it was asked, or after its start."""


class Devices:
    """Passes the devices from engines to learner and back; does nothing where each has its own.

    That nobody fills a device out of turn is up to `DeviceTurn`, which each process of the two holds meanwhile: it
    outlasts deaths and restarts. This class says when.
    """

    def __init__(self, config: Config, *, supervisor: Supervisor, learners: LearnerGroup) -> None:
        """The engines have them: they start first."""
        self._shared = config.cluster.colocate
        self._supervisor = supervisor
        self._learners = learners

    def to_learner(self) -> None:
        """All engines asleep, then the ranks' memory back on their devices.

        Raises:
            WaitTimeout: an engine did not fall asleep in time.
            LearnerDied: a rank died.
        """
        if self._shared:
            self.rest_engines()
            self._learners.wait(self._learners.call(LearnerActor.restore), what="the learner's turn with the devices")

    def to_engines(self) -> None:
        """The ranks' memory on the host, then all engines awake; they take newer weights by themselves.

        Raises:
            LearnerDied: a rank died.
        """
        if not self._shared:
            return
        self._learners.wait(self._learners.call(LearnerActor.offload), what="giving the devices to the engines")
        self._supervisor.resting = False
        for loop in self._supervisor.loops:
            if loop.takes_weights:
                loop.process.asked_at = time.monotonic()
                call(loop.process.actor, RolloutActor.wake, SLEEP_TIMEOUT_S)

    def rest_engines(self) -> None:
        """Wait until every rollout actor sleeps, also those that replace others meanwhile.

        Raises:
            WaitTimeout: one did not in time.
        """
        if not self._shared:
            return
        asked: dict[str, ObjectRef[None]] = {}
        deadline = time.monotonic() + STARTUP_TIMEOUT_S + SLEEP_TIMEOUT_S
        while waiting := [worker for worker, ref in self._asked(asked).items() if not _has_done(ref)]:
            if time.monotonic() > deadline:
                raise WaitTimeout(
                    f"{', '.join(waiting)} did not fall asleep, so that the learner cannot have the device "
                    "(cluster.colocate)"
                )
            ray.wait([asked[worker] for worker in waiting], num_returns=len(waiting), timeout=TICK_S)
            self._supervisor.tick()
        self._supervisor.resting = True

    def _asked(self, asked: dict[str, ObjectRef[None]]) -> dict[str, ObjectRef[None]]:
        """The answers of the present rollout actors, each asked once to sleep."""
        processes = [loop.process for loop in self._supervisor.loops if loop.takes_weights]
        for process in processes:
            if process.worker not in asked:
                asked[process.worker] = call(process.actor, RolloutActor.sleep, SLEEP_TIMEOUT_S)
        return {process.worker: asked[process.worker] for process in processes}


def _has_done(ref: ObjectRef[None]) -> bool:
    if not is_ready(ref):
        return False
    try:
        ray.get(ref, timeout=TICK_S)
    except RayActorError:
        return False  # another process takes its place
    except RayTaskError as error:
        raise PmdflowError(f"an engine cannot give its device to the learner: {error.cause}") from error
    return True
