"""Stored rollouts judged again by other reward functions, in parallel."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import wait
from dataclasses import replace
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import Progress

from pmdflow.config.schema import Config
from pmdflow.data.prompts import make_prompts
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.errors import PmdflowError, WaitTimeout
from pmdflow.reward.item import ScoreItem
from pmdflow.reward.rubric import Scored
from pmdflow.reward.runner import START_TIMEOUT_S, RewardRunner
from pmdflow.types import Prompt, Stop, TrainBatch

ROWS_PER_GROUP = 4
"""Of an endless source, prompts that are looked through for each group that the run can have admitted."""
ROWS_MORE = 4096


def rewards_differ(config: Config, recorded: Config) -> bool:
    """Whether other functions judge than those that gave the stored rewards."""
    return any(_judged_by(config)[key] != value for key, value in _judged_by(recorded).items())


def _judged_by(config: Config) -> dict[str, object]:
    functions = [entry.model_dump() for entry in config.reward.functions]
    own = {name: [entry.model_dump() for entry in given] for name, given in config.own_rewards.items()}
    return {"functions": functions, "own": own, "invalid": config.reward.invalid}


class Rescorer:
    """Judges claims by the reward functions of a configuration; enter it to start the reward processes.

    Example:
        with Rescorer(config, batches) as rescorer:     # batches: those that will be judged
            batch = rescorer.judge(batch)
    """

    def __init__(self, config: Config, *, prompt_ids: Collection[str], last_group: int) -> None:
        """Find the prompts again that the archive only names.

        Raises:
            PmdflowError: one is not among those of `data.task`.
            ValueError: the data cannot be read.
        """
        self._prompts = _find_prompts(config, set(prompt_ids), last_group)
        self._tokenizer = load_tokenizer(config.model.path)
        self._attempts, self._timeout_s = config.reward.max_attempts, config.reward.timeout_s
        workers = max(config.reward.workers, os.cpu_count() or 1)
        self._runner = RewardRunner(config.reward.model_copy(update={"workers": workers}), config.own_rewards)

    def __enter__(self) -> Self:
        """The processes live."""
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self._runner.close()

    def judge(self, batch: TrainBatch) -> TrainBatch:
        """The claim with the rewards and components of the new functions; a bar shows how far it is.

        Raises:
            PmdflowError: a function fails without an answer `reward.max_attempts` times, or an episode has branches.
        """
        if batch.branches is not None:
            raise PmdflowError(
                f"iteration {batch.iteration} has episodes of several branches, which cannot be judged again",
                hint="leave reward.functions as they were",
            )
        scores = self._scores(batch)
        names = sorted({name for scored in scores for name in scored.components})
        components = {name: np.array([scored.components.get(name, np.nan) for scored in scores]) for name in names}
        return replace(batch, rewards=np.array([scored.reward for scored in scores]), components=components)

    def _scores(self, batch: TrainBatch) -> list[Scored]:
        items = [self._item(batch, index) for index in range(len(batch.rewards))]
        title = f"judging iteration {batch.iteration}"
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=len(items))
            futures = [self._runner.submit(item) for item in items]
            for future in futures:
                future.add_done_callback(lambda _: progress.advance(task))
            limit_s = (len(items) + 1) * (self._timeout_s + START_TIMEOUT_S)  # each in turn, and a new process for it
            late = wait(futures, timeout=limit_s).not_done
        if late:
            raise WaitTimeout(f"{len(late)} of {len(items)} answers were not judged within {limit_s:g} s")
        scores = [future.result() for future in futures]
        for index, scored in enumerate(scores):
            for _ in range(self._attempts - 1):
                if scored.outcome != "infra_failure":
                    break
                (scored,) = self._runner.map([items[index]])
            if scored.outcome == "infra_failure":
                raise PmdflowError(
                    f"trajectory {batch.trajectories[index]} of iteration {batch.iteration} cannot be judged: "
                    f"{scored.message}",
                    hint="mend the reward function, or raise reward.timeout_s",
                )
            scores[index] = scored
        return scores

    def _item(self, batch: TrainBatch, index: int) -> ScoreItem:
        first, last = batch.cu_seqlens[index : index + 2]
        prompt = self._prompts[batch.prompt_ids[index]]
        return ScoreItem.of_tokens(
            batch.tokens[first + batch.prompt_lengths[index] : last].tolist(),
            tokenizer=self._tokenizer,
            inputs=self._runner.inputs,
            prompt=prompt.text,
            stop=Stop(batch.stops[index]).name.lower(),
            metadata=prompt.metadata,
        )


def _find_prompts(config: Config, wanted: set[str], last_group: int) -> Mapping[str, Prompt]:
    found: dict[str, Prompt] = {}
    prompts = make_prompts(config)
    for source in prompts.sources:
        for row in range(source.num_train or ROWS_PER_GROUP * last_group + ROWS_MORE):
            if len(found) == len(wanted):
                break
            prompt = source.at(row)
            if prompt.id in wanted:
                found[prompt.id] = prompt
    missing = sorted(wanted - found.keys())
    if missing:
        raise PmdflowError(
            f"{len(missing)} prompts of the stored rollouts are not among those of data.task, {missing[0]!r} first",
            hint="give the data and the run.seed that the run was made with",
        )
    return found
