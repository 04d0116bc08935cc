"""The learner again on the recorded claims of a run, claim after claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from pmdflow.config.load import load_run
from pmdflow.config.recorded import recorded_meta
from pmdflow.config.schema import Config
from pmdflow.errors import PmdflowError
from pmdflow.learner.actor import LearnerActor
from pmdflow.learner.checkpoint.manifest import manifest_at
from pmdflow.learner.result import TrainResult
from pmdflow.metrics.history import iterations
from pmdflow.run.actors import start_learners, start_ray
from pmdflow.run.placement import place_learners
from pmdflow.store.archive import part_iteration, parts, read_part
from pmdflow.store.client import call
from pmdflow.store.plan import deal
from pmdflow.types import TrainBatch

STEP_TIMEOUT_S = 7200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One iteration, as recorded and as replayed."""

    iteration: int
    recorded: Sequence[float]
    """Loss of each optimizer step when the run was made."""
    losses: Sequence[float]
    """Loss of each optimizer step now."""
    advantages: np.ndarray[Any, np.dtype[np.float64]]
    """Advantage of each trajectory now, shape [N]."""

    @property
    def first_difference(self) -> int | None:
        """Number of the first step whose losses are not equal bit for bit, or None."""
        if len(self.recorded) != len(self.losses):
            return min(len(self.recorded), len(self.losses))
        pairs = enumerate(zip(self.recorded, self.losses, strict=True))
        return next((step for step, (recorded, loss) in pairs if recorded != loss), None)


def replay_claims(run: Path, config: Config, *, start: int, verify: bool = False) -> Iterator[Replayed]:
    """Replay claim after claim; yields each iteration as soon as it is trained.

    Args:
        run: Run directory.
        config: Its configuration, or one that differs; with another number of steps, claims are dealt anew.
        start: Iteration of the checkpoint to begin from; 0 is the initial weights.
        verify: Refuse a learner that computes otherwise than the recorded one.

    Raises:
        PmdflowError: as `replay` says.

    Example:
        for result in replay_claims(Path("runs/quickstart"), config, start=0):
            print(result.iteration, result.losses)
    """
    recorded, claims = iterations(run), claims_after(run, start)
    dealt_anew = config.learner.steps_per_iteration != load_run(run).config.learner.steps_per_iteration
    start_ray(config)
    try:
        learners = start_learners(config, run, place_learners(config), log_prefix="replay-")
        if verify:
            check_same(run, "learner", ray.get(call(learners[0], LearnerActor.device_info), timeout=STEP_TIMEOUT_S))
        _load(learners, run, start=start)
        for iteration, path in claims:
            batch = ray.put(claim_to_train(path, anew=config if dealt_anew else None))
            results: list[TrainResult] = ray.get(
                [learner.train_batch.remote(batch) for learner in learners], timeout=STEP_TIMEOUT_S
            )
            result = results[0]
            yield Replayed(
                iteration=iteration,
                recorded=recorded[iteration]["learner/step_losses"],
                losses=result.metrics["learner/step_losses"],
                advantages=result.advantages,
            )
    finally:
        ray.shutdown()


def claim_to_train(path: Path, *, anew: Config | None) -> TrainBatch:
    """An archived claim with the plan by which it was trained, or dealt anew to the steps of another configuration."""
    claim = read_part(path)
    if anew is None:
        return claim
    return replace(claim, plan=deal(claim, anew.learner.steps_per_iteration, seed=anew.run.seed))


def _load(learners: Sequence[ActorHandle[LearnerActor]], run: Path, *, start: int) -> None:
    """Give every rank the initial weights, or the state of a checkpoint."""
    if start == 0:
        loads = [call(learner, LearnerActor.load_initial) for learner in learners]
    else:
        directory = str(manifest_at(run / "checkpoints", start).directory)
        loads = [call(learner, LearnerActor.load, directory) for learner in learners]
    ray.get(loads, timeout=STEP_TIMEOUT_S)


def claims_after(run: Path, start: int) -> list[tuple[int, Path]]:
    """Archived claims after iteration `start`, without a gap."""
    archived = {part_iteration(path): path for path in parts(run)}
    claims = [(iteration, archived[iteration]) for iteration in sorted(archived) if iteration > start]
    for expected, (iteration, _) in enumerate(claims, start + 1):
        if iteration != expected:
            raise PmdflowError(
                f"{run}/archive has no part of iteration {expected}, so iteration {iteration} cannot be replayed",
                hint="replay from a later checkpoint: --from ITERATION",
            )
    if not claims:
        raise PmdflowError(
            f"{run}/archive holds no claim after iteration {start}",
            hint="claims are archived when a checkpoint is committed; wait for the next one",
        )
    return claims


def check_same(run: Path, what: str, here: Mapping[str, Any]) -> None:
    """Refuse to compare bit for bit where floating point may differ from what meta.json says of the run."""
    if not (run / "meta.json").is_file():
        raise PmdflowError(f"{run} has no meta.json: its learner never started, so there is nothing to verify")
    recorded = recorded_meta(run).get(what)
    if not isinstance(recorded, dict):
        raise PmdflowError(
            f"{run}/meta.json is torn: it does not say on what the run was made",
            hint="bring it back from a copy, or replay without --verify to compare",
        )
    for name, now in here.items():
        if recorded.get(name, now) != now:
            raise PmdflowError(
                f"--verify: the run was made with {name} {recorded[name]!r}, here it is {now!r}: equality bit for bit "
                "is not to be expected",
                hint="replay without --verify to compare",
            )
