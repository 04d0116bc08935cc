"""Offline replay: the learner again on the recorded claims, without rollout actors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.errors import PmdflowError
from pmdflow.learner.checkpoint.manifest import manifest_at
from pmdflow.metrics.history import History
from pmdflow.run.directory import hardware

if TYPE_CHECKING:
    from pmdflow.learner.learner import TrainResult
from pmdflow.store.archive import part_iteration, parts, read_part

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


def replay(run: Path, *, verify: bool, start: int, overrides: Sequence[str]) -> int:
    """Train again on the archived claims of `run`, from its initial weights or from a kept checkpoint.

    Args:
        run: Run directory; it may be finished, crashed or live.
        verify: Compare every step's loss with the recorded one, bit for bit, and stop at the first difference.
        start: Iteration of the checkpoint to begin from; 0 is the initial weights.
        overrides: Dotted settings that differ from the recorded ones, such as `learner.tau=0.1`.

    Returns:
        0, or 1 if `verify` found a difference.

    Raises:
        PmdflowError: nothing to replay, no such checkpoint, or hardware on which equality is not to be expected.
    """
    run = run.absolute()
    if verify and overrides:
        raise PmdflowError("--verify compares with the recorded settings; leave out --set, or leave out --verify")
    if not (run / "config.yaml").is_file():
        raise PmdflowError(f"{run} is no run directory (it has no config.yaml)")
    config = load(run / "config.yaml", overrides).config
    if verify:
        _check_same(run, "hardware", hardware())
    console = Console(file=sys.stdout, soft_wrap=True)
    title = f"replay of {run.name}" + (f" with {', '.join(overrides)}" if overrides else "")
    table = Table("iteration", "recorded loss", "replayed loss", "mean |advantage|", "equal", title=title)
    equal = 0
    for result in replay_claims(run, config, start=start, verify=verify):
        difference = result.first_difference
        table.add_row(
            str(result.iteration),
            f"{np.mean(result.recorded):+.6e}",
            f"{np.mean(result.losses):+.6e}",
            f"{np.abs(result.advantages).mean():.4f}",
            "yes" if difference is None else "no",
        )
        equal += difference is None
        if verify and difference is not None:
            console.print(table)
            console.print(_describe(result, difference))
            return 1
    console.print(table)
    console.print(f"{equal} of {table.row_count} iterations have equal losses, bit for bit")
    return 0


def replay_claims(run: Path, config: Config, *, start: int, verify: bool = False) -> Iterator[Replayed]:
    """Replay claim after claim; yields each iteration as soon as it is trained.

    Args:
        run: Run directory.
        config: Its configuration, or one that differs.
        start: Iteration of the checkpoint to begin from; 0 is the initial weights.
        verify: Refuse a learner that computes otherwise than the recorded one.

    Raises:
        PmdflowError: as `replay` says.

    Example:
        for result in replay_claims(Path("runs/quickstart"), config, start=0):
            print(result.iteration, result.losses)
    """
    import ray

    from pmdflow.learner.actor import LearnerActor
    from pmdflow.run.actors import start_learners, start_ray
    from pmdflow.run.placement import place_learners
    from pmdflow.store.client import call

    history = History(run, max_spans=0)
    history.update()
    claims = _claims_after(run, start)
    start_ray(config)
    try:
        learners = start_learners(config, run, place_learners(config), log_prefix="replay-")
        if verify:
            _check_same(run, "learner", ray.get(call(learners[0], LearnerActor.device_info), timeout=STEP_TIMEOUT_S))
        if start == 0:
            loads = [call(learner, LearnerActor.load_initial) for learner in learners]
        else:
            directory = str(manifest_at(run / "checkpoints", start).directory)
            loads = [call(learner, LearnerActor.load, directory) for learner in learners]
        ray.get(loads, timeout=STEP_TIMEOUT_S)
        for iteration, path in claims:
            batch = ray.put(read_part(path))
            results: list[TrainResult] = ray.get(
                [learner.train.remote(batch) for learner in learners], timeout=STEP_TIMEOUT_S
            )
            result = results[0]
            yield Replayed(
                iteration=iteration,
                recorded=history.iterations[iteration]["learner/step_losses"],
                losses=result.metrics["learner/step_losses"],
                advantages=result.advantages,
            )
    finally:
        ray.shutdown()


def _claims_after(run: Path, start: int) -> list[tuple[int, Path]]:
    """Archived claims after iteration `start`, without a gap."""
    archived = {part_iteration(path): path for path in parts(run)}
    claims = [(iteration, archived[iteration]) for iteration in sorted(archived) if iteration > start]
    for expected, (iteration, _) in enumerate(claims, start + 1):
        if iteration != expected:
            raise PmdflowError(
                f"{run}/archive has no part of iteration {expected}, so iteration {iteration} cannot be replayed"
            )
    if not claims:
        raise PmdflowError(f"{run}/archive holds no claim after iteration {start}; claims are archived at checkpoints")
    return claims


def _check_same(run: Path, what: str, here: Mapping[str, Any]) -> None:
    """Refuse to compare bit for bit where floating point may differ from what meta.json says of the run."""
    if not (run / "meta.json").is_file():
        raise PmdflowError(f"{run} has no meta.json: its learner never started, so there is nothing to verify")
    recorded = json.loads((run / "meta.json").read_text())[what]
    for name, now in here.items():
        if recorded.get(name, now) != now:
            raise PmdflowError(
                f"--verify: the run was made with {name} {recorded[name]!r}, here it is {now!r}; equality bit for bit "
                "is not to be expected, replay without --verify to compare"
            )


def _describe(result: Replayed, step: int) -> str:
    if len(result.recorded) != len(result.losses):
        return (
            f"first difference: iteration {result.iteration} has {len(result.recorded)} recorded steps, "
            f"{len(result.losses)} replayed"
        )
    recorded, now = result.recorded[step], result.losses[step]
    relative = abs(now - recorded) / max(abs(recorded), math.ulp(0.0))
    return (
        f"first difference: iteration {result.iteration}, step {step}: recorded {recorded!r}, replayed {now!r} "
        f"(relative {relative:.2e})"
    )
