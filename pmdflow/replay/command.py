"""`pmdflow replay`: the recorded claims of a run again, offline, beside what the run recorded."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pmdflow.config.gpus import planned_gpus
from pmdflow.config.load import load_run
from pmdflow.config.settle import settle
from pmdflow.errors import PmdflowError
from pmdflow.replay.claims import Replayed, check_same, replay_claims
from pmdflow.run.directory import hardware


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
        raise PmdflowError("--verify compares with the recorded settings", hint="leave out --set, or --verify")
    if not (run / "config.yaml").is_file():
        raise PmdflowError(f"{run} is no run directory (it has no config.yaml)")
    loaded = load_run(run, overrides).config
    config = settle(loaded, gpus=planned_gpus(loaded))
    if verify:
        check_same(run, "hardware", hardware())
    console = Console(file=sys.stdout, soft_wrap=True)
    title = f"replay of {run.name}" + (f" with {', '.join(overrides)}" if overrides else "")
    table = Table("iteration", "recorded loss", "replayed loss", "mean |advantage|", "equal", title=title)
    equal = 0
    for result in replay_claims(run, config, start=start, verify=verify):
        difference = result.first_difference
        table.add_row(*_row(result))
        equal += difference is None
        if verify and difference is not None:
            console.print(table)
            console.print(_describe(result, difference))
            return 1
    console.print(table)
    console.print(f"{equal} of {table.row_count} iterations have equal losses, bit for bit")
    return 0


def _row(result: Replayed) -> tuple[str, ...]:
    return (
        str(result.iteration),
        f"{np.mean(result.recorded):+.6e}",
        f"{np.mean(result.losses):+.6e}",
        f"{np.abs(result.advantages).mean():.4f}",
        "yes" if result.first_difference is None else "no",
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
