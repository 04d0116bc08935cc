"""Who evaluates a policy version: rollout actors that keep it until its round is over."""

from __future__ import annotations

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from pmdflow.rollout.actor import RolloutActor
from pmdflow.rollout.evaluation import Ended
from pmdflow.run.loops import Running, is_ready
from pmdflow.run.supervision import Supervisor
from pmdflow.store.client import call

ANSWER_TIMEOUT_S = 120.0


class Evaluators:
    """Has a few rollout actors evaluate one version. Never waits."""

    def __init__(self, *, supervisor: Supervisor, version: int, hold_s: float, number: int) -> None:
        """Have at most `number` actors keep `version`, each for at most `hold_s`; `tick` finds them."""
        self._supervisor = supervisor
        self._version = version
        self._hold_s = hold_s
        self._number = number
        self._turns: dict[str, tuple[Running, ObjectRef[Ended]]] = {}
        """Who evaluates now, by the name of the worker, and what it answers at the end."""
        self._past: set[str] = set()
        """Workers that have a newer version."""
        self._begun = self._enough = False
        self.is_late = False
        """Whether an actor has kept the version for `hold_s`, and something was unfinished."""

    @property
    def busy(self) -> bool:
        """Whether somebody evaluates, or is still looked for."""
        return bool(self._turns) or not self._begun

    @property
    def are_past(self) -> bool:
        """Whether every rollout actor that there is has a newer version."""
        there = [process.worker for process in self._there()]
        return bool(there) and all(worker in self._past for worker in there)

    def tick(self) -> None:
        """Take the answers of those whose part is over; while nothing says that all is leased, find others."""
        self.settle()
        if not (self._enough or self.is_late):
            self.assign()

    def settle(self) -> bool:
        """Take these answers alone; whether nobody evaluates any more."""
        for worker, (process, turn) in list(self._turns.items()):
            if not is_ready(turn):
                continue
            del self._turns[worker]
            process.evaluates = None
            try:
                ended: Ended = ray.get(turn, timeout=ANSWER_TIMEOUT_S)
            except RayError:
                continue  # whoever watches over its loop replaces it; the others get its leases
            self._enough |= ended == "done"
            self.is_late |= ended == "late"
            if ended == "passed":
                self._past.add(worker)
        return not self._turns

    def assign(self) -> bool:
        """Have as many evaluate as should; whether anybody does."""
        free = [process for process in self._there() if process.worker not in self._past | self._turns.keys()]
        for process in free[: self._number - len(self._turns)]:
            turn = call(process.actor, RolloutActor.evaluate, self._version, self._hold_s)
            process.evaluates = self._version
            self._turns[process.worker] = process, turn
        self._begun |= bool(self._turns)
        return bool(self._turns)

    def _there(self) -> list[Running]:
        return [loop.process for loop in self._supervisor.rollouts if loop.process.placed]
