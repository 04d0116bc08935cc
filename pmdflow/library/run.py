"""A run directory, read from Python: live, finished, crashed or copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pmdflow.config.load import load_run
from pmdflow.config.schema import Config
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.errors import PmdflowError
from pmdflow.library.trajectories import Group, Trajectory, archived, grouped, stored
from pmdflow.metrics.history import History, Record
from pmdflow.run.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pmdflow.export.options import Dtype

Kind = Literal["iteration", "eval", "sample"]
"""Of a run's records."""


def open_run(path: str | PathLike[str]) -> Run:
    """Open a run directory to read it; nothing is changed in it.

    Raises:
        PmdflowError: it is no run directory.

    Example:
        >>> run = pmdflow.open_run("runs/quickstart")                       # doctest: +SKIP
        >>> [row["reward/mean"] for row in run.metrics()]                   # doctest: +SKIP
    """
    if not (Path(path) / "config.yaml").is_file():
        raise PmdflowError(f"{path} is no run directory (it has no config.yaml)")
    return Run(path=Path(path))


@dataclass(frozen=True)
class Run:
    """What a run directory holds, as it is at each call. Made by `open_run` and `up`."""

    path: Path

    @cached_property
    def config(self) -> Config:
        """Its settings."""
        return load_run(self.path).config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its model's tokenizer: `run.tokenizer.decode(trajectory.tokens)`."""
        return load_tokenizer(self.config.model.path)

    @property
    def is_live(self) -> bool:
        """Whether somebody trains it."""
        return RunDirectory.is_live(self.path)

    def metrics(self, kind: Kind = "iteration", *, eval_set: str | None = None) -> list[Record]:
        """Its records by the keys of METRICS.md, oldest first; what a resume trained again is there once.

        Args:
            kind: Of the records; samples are thinned out where there are many.
            eval_set: One of `eval.sets`; None is the held-out prompts of `data`.

        Raises:
            PmdflowError: there is no such kind, or the run has no such evaluation set.
        """
        if kind not in get_args(Kind):
            raise PmdflowError(f"there are no records of kind {kind!r}", hint=f"kinds are {', '.join(get_args(Kind))}")
        if eval_set is not None and eval_set not in self.config.eval.sets:
            names = ", ".join(self.config.eval.sets) or "none"
            raise PmdflowError(f"{self.path} has no evaluation set {eval_set!r}", hint=f"there is {names}")
        history = History(self.path, max_spans=0)
        history.update()
        if kind == "sample":
            return list(history.samples)
        evals = history.evals if eval_set is None else history.eval_sets[eval_set]
        records = history.iterations if kind == "iteration" else evals
        return [records[number] for number in sorted(records)]

    def trajectories(self, iteration: int | None = None) -> Iterator[Trajectory]:
        """What was generated for training, or what one iteration claimed, read lazily.

        Trained ones come from the archive, in the order of claims; then those that only the store has, by group:
        claimed, ready, waiting for a reward or still being generated, as they are now.
        """
        return chain(archived(self.path, iteration), stored(self.path, iteration))

    def groups(self, iteration: int | None = None) -> Iterator[Group]:
        """The same by prompt."""
        return grouped(self.trajectories(iteration))

    def checkpoint(self, iteration: int | None = None) -> Checkpoint:
        """The checkpoint of an iteration, or the newest one.

        Raises:
            PmdflowError: there is none; the message lists those that are kept.
        """
        from pmdflow.export.held import HeldCheckpoint

        with HeldCheckpoint.of(self.path, iteration) as held:
            return Checkpoint(run=self, iteration=held.manifest.iteration, version=held.manifest.version)


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a run. Made by `Run.checkpoint`."""

    run: Run
    iteration: int
    """Iterations trained."""
    version: int
    """Policy version of the weights."""

    def model(self, dtype: Dtype | None = None) -> PreTrainedModel:
        """The policy as a transformers model on the CPU, adapters merged; in `dtype`, or in the run's.

        Raises:
            PmdflowError: the checkpoint was pruned meanwhile, or is of another model than the model folder holds now.
        """
        from pmdflow.export.model import load_model

        return load_model(self.run.path, self.iteration, dtype)

    def export(self, out: str | PathLike[str], *, adapter: bool = False, dtype: Dtype | None = None) -> None:
        """Write it as a Hugging Face folder, as `pmdflow export` does.

        Raises:
            PmdflowError: as in `model`, or `out` is a folder that is not empty.
        """
        from pmdflow.export.options import ExportOptions
        from pmdflow.export.write import export

        export(self.run.path, Path(out), ExportOptions(iteration=self.iteration, adapter=adapter, dtype=dtype))
