"""Learner ranks in processes that live as long as the tests of a module: torch is imported once, not once a test."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pmdflow.config.schema import Config
from pmdflow.learner.checkpoint.manifest import CheckpointFile
from pmdflow.learner.fsdp import build_policy, free_address, join_ranks
from pmdflow.learner.learner import Learner
from pmdflow.types import TrainBatch
from tests.support.resident import most_resident

TIMEOUT_S = 90.0
LOADING_TIMEOUT_S = 600.0
"""Of a model that may have a gigabyte."""
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What one rank did."""

    metrics: list[dict[str, Any]]
    """Of each claim."""
    left_out: list[dict[str, list[int]]]
    weights: dict[str, npt.NDArray[np.float32]] | None
    """At rank 0."""
    files: tuple[CheckpointFile, ...]
    """What it says it wrote."""


class Ranks:
    """At most `most` ranks at a time; a process is always the same one, as torch remembers which shards it holds."""

    def __init__(self, most: int) -> None:
        """Nothing starts before the first call."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pmdflow.learner.learner"])
        self._processes = [ProcessPoolExecutor(1, mp_context=context) for _ in range(most)]

    def train(
        self,
        config: Config,
        claims: Sequence[TrainBatch],
        *,
        load: Path | None = None,
        save: Path | None = None,
        save_after: int = 0,
    ) -> list[Trained]:
        """Every rank loads, trains on the claims and saves after so many of them; what each saw."""
        return self.call(_train, config, claims, load, save, save_after)

    def call(self, work: Callable[..., Answer], config: Config, *arguments: Any) -> list[Answer]:
        """What `work` answers on each rank, given its number, the configuration, where to meet and `arguments`."""
        given = config, free_address("127.0.0.1"), *arguments
        ranks = [self._processes[rank].submit(work, rank, *given) for rank in range(config.learner.num_ranks)]
        done, pending = wait(ranks, timeout=TIMEOUT_S, return_when=FIRST_EXCEPTION)
        if pending:  # one has failed, and the others wait for it in a collective
            self.kill()
            for rank in done:
                rank.result()
            raise TimeoutError(f"{len(pending)} of {len(ranks)} ranks did not train within {TIMEOUT_S:g} s")
        return [rank.result() for rank in ranks]

    def refusals(self, config: Config) -> list[str]:
        """What each rank says when it refuses its model."""
        master = free_address("127.0.0.1")
        ranks = [self._processes[rank].submit(_refusal, rank, config, master) for rank in range(config.learner.ranks)]
        return [rank.result(TIMEOUT_S) for rank in ranks]

    def loading(self, config: Config, *, after: str) -> list[int]:
        """The bytes by which each rank's memory grows at most while it loads its part of a model, `after` another."""
        given = config, after, free_address("127.0.0.1")
        ranks = [self._processes[rank].submit(_loading, rank, *given) for rank in range(config.learner.num_ranks)]
        return [rank.result(LOADING_TIMEOUT_S) for rank in ranks]

    def kill(self) -> None:
        """End all processes."""
        for pool in self._processes:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown()


def _train(
    rank: int,
    config: Config,
    master: str,
    claims: Sequence[TrainBatch],
    load: Path | None,
    save: Path | None,
    save_after: int,
) -> Trained:
    learner = Learner(config=config, rank=rank)
    learner.setup(master)
    try:
        if load is not None:
            learner.load(str(load))
        results = []
        for number, claim in enumerate(claims, 1):
            results.append(learner.train(claim))
            if save is not None and number == save_after:
                learner.save(str(save))
        weights = learner.weights()
        return Trained(
            metrics=[result.metrics for result in results],
            left_out=[result.left_out for result in results],
            files=learner.await_saved(),
            weights=None if weights is None else {name: tensor.numpy() for name, tensor in weights.items()},
        )
    finally:
        learner.close()


def _loading(rank: int, config: Config, after: str, master: str) -> int:
    learner = config.learner
    torch.set_num_threads(1)
    mesh = join_ranks(master, rank=rank, ranks=learner.num_ranks, device=torch.device("cpu"))
    try:
        build_policy(after, dtype=config.model.dtype, learner=learner, mesh=mesh)  # imports what it takes
        with most_resident() as most:
            build_policy(config.model.path, dtype=config.model.dtype, learner=learner, mesh=mesh)
        return most()
    finally:
        dist.destroy_process_group()


def _refusal(rank: int, config: Config, master: str) -> str:
    learner = Learner(config=config, rank=rank)
    try:
        learner.setup(master)
    except ValueError as error:
        return str(error)
    finally:
        learner.close()
    return ""
