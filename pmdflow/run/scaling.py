"""More or fewer rollout actors in a live run: a request in the run directory, which the run takes up and remembers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pmdflow import durable
from pmdflow.errors import PmdflowError

if TYPE_CHECKING:
    from pmdflow.config.schema import Config
    from pmdflow.run.actors import LoopMaker
    from pmdflow.run.supervision import Supervisor

REQUEST = Path("requests") / "scale.json"
RECORD = "scale.json"
"""In the run directory: how many there are, and what `rollout.actors` was when that was asked for."""
MOST = 4096
"""Rollout actors that may be asked for."""
_FORM = re.compile(r"rollout=(\d+)")


def ask(run: Path, wanted: str) -> str:
    """Leave a request in the directory of a live run; `wanted` is `rollout=N`. Returns what to tell.

    Raises:
        PmdflowError: that is no request, or the run is not going on.
    """
    from pmdflow.run.directory import RunDirectory

    form = _FORM.fullmatch(wanted)
    number = int(form[1]) if form else 0
    if not 1 <= number <= MOST:
        raise PmdflowError(f"{wanted!r} is nothing to scale to", hint=f"rollout=N, with N from 1 to {MOST}")
    if not RunDirectory.is_live(run):
        raise PmdflowError(
            f"{run} is not going on", hint=f"start it with so many: `pmdflow up CONFIG rollout.actors={number}`"
        )
    (run / REQUEST).parent.mkdir(exist_ok=True)
    durable.write(run / REQUEST, json.dumps({"rollout": number}) + "\n")
    return f"asked the run to have {number} rollout actors; its events say when it has"


def remembered(run: Path, config: Config) -> Config:
    """A configuration with the number of rollout actors that the run was scaled to, unless that setting was changed."""
    try:
        record = json.loads((run / RECORD).read_text())
        number, configured = int(record["rollout"]), record["configured"]
    except (OSError, ValueError, KeyError, TypeError):
        return config
    if configured != config.rollout.actors or not 1 <= number <= MOST:
        return config
    return with_actors(config, number)


def with_actors(config: Config, number: int) -> Config:
    """The same with so many rollout actors."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"actors": number})})


class Scaling:
    """Starts and ends rollout actors as it is asked to. Never waits.

    What is taken away finishes what it sends, gives its leases back and ends; another one goes on with those.
    """

    def __init__(
        self,
        *,
        run: Path,
        supervisor: Supervisor,
        configured: int | str,
        maker: LoopMaker,
        fixed: bool = False,
    ) -> None:
        """Look for requests in `run`; `maker` gives the loops of rollout actors, without starting them.

        `configured` is `rollout.actors` as written; with `fixed` every request is refused.
        """
        self._run = run
        self._supervisor = supervisor
        self._configured = configured
        self._maker = maker
        self._fixed = fixed
        supervisor.watchers.append(self.tick)

    def tick(self) -> None:
        """Take up a request if there is one, and answer it by an event."""
        path = self._run / REQUEST
        if not path.exists():
            return
        try:
            number = json.loads(path.read_text())["rollout"]
        except (OSError, ValueError, KeyError, TypeError):
            number = None
        path.unlink(missing_ok=True)
        tell = self._supervisor.telemetry.event
        if type(number) is not int or not 1 <= number <= MOST:
            tell("scale", f"request {path.name} is refused: it does not say how many, from 1 to {MOST}")
            return
        if self._fixed:
            tell("scale", f"request {path.name} is refused: with cluster.colocate there is an actor for each rank")
            return
        record = {"rollout": number, "configured": self._configured}
        durable.write(self._run / RECORD, json.dumps(record) + "\n")
        before = self._supervisor.rollouts
        for loop in before[number:]:
            self._supervisor.retire(loop)
        self._maker.scaled(number)
        taken = {loop.name for loop in self._supervisor.loops}
        missing = (loop for loop in map(self._maker.rollout, range(MOST)) if loop.name not in taken)
        for _ in range(len(before), number):
            self._supervisor.start_loop(next(missing))
        tell("scale", f"rollout actors: {len(before)} before, {number} from now on")
