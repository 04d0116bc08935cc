"""`pmdflow eval`: one checkpoint on one task; what it takes, the settings that follow, and the order of the work."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from pmdflow.config.gpus import local_gpus
from pmdflow.config.imports import locate
from pmdflow.config.installed import require_engine
from pmdflow.config.load import load, load_run
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.config.sources import (
    FILE_SUFFIXES,
    GYM_PREFIX,
    WORDING,
    EvalSetConfig,
    SourceConfig,
    SourceSettings,
)
from pmdflow.data.model_folder import num_positions
from pmdflow.data.prompts import make_prompts, read_prompts
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.errors import LaunchError
from pmdflow.evaluate.checkpoint import Checkpoint, find_checkpoint, is_run, make_engine_of, stored_dtype
from pmdflow.evaluate.results import print_table, summarize, write_results
from pmdflow.evaluate.task import Sample, generate_and_score
from pmdflow.reward.runner import RewardRunner
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.types import Prompt

DEFAULT_MAX_TOKENS = 1024
"""Most of an answer where nothing says it; half of the positions of a model that has fewer than twice as many."""
GYM_REWARD = "pmdflow.reward.reasoning_gym:score"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """The command line; None leaves a setting to the configuration of the task file or of the checkpoint's run."""

    samples: int = 1
    ks: Sequence[int] = ()
    """k of pass@k; empty takes the powers of two up to `samples`."""
    prompts: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()
    reward: Sequence[str] = ()
    pass_reward: float = 1.0
    engine: str | None = None
    seed: int = 0
    out: Path | None = None


def evaluate_checkpoint(path: Path, task: str, options: EvalOptions) -> int:
    """Evaluate, write the results and print the table.

    Raises:
        LaunchError: no such checkpoint or task, or settings that do not fit; nothing was generated.
        WaitTimeout: generation or scoring stands still.
    """
    checkpoint = find_checkpoint(path)
    config = eval_config(checkpoint, task, options)
    require_engine(config.rollout, greedy=config.eval.temperature == 0)
    ks = _ks(options)
    try:
        prompts = _prompts(config, task, options)
        results, seconds = _samples(checkpoint, config, prompts, options)
    except ValueError as error:
        raise LaunchError(str(error)) from error
    summary: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "version": checkpoint.version,
        "task": task,
        "samples": options.samples,
        "pass_reward": options.pass_reward,
        "seed": options.seed,
        "engine": config.rollout.engine,
        **summarize(results, ks=ks, pass_reward=options.pass_reward),
    }
    summary |= {"seconds": seconds, "tokens_per_s": summary["tokens"] / seconds}
    out = options.out or Path("evals") / re.sub(r"[^\w.-]+", "-", f"{checkpoint.name}-{Path(task).name}")
    write_results(out, prompts, results, summary)
    console = Console(file=sys.stdout, soft_wrap=True)
    print_table(summary, console)
    console.print(f"per prompt: {out / 'samples.jsonl'}; summary: {out / 'summary.json'}")
    return 0 if summary["infra_failures"] < summary["attempts"] else 1


def eval_config(checkpoint: Checkpoint, task: str, options: EvalOptions) -> Config:
    """The settings of the evaluation: those of the task's configuration file or of the run, and the options over them.

    Raises:
        LaunchError: the task is unknown, no reward function is known for it, or the settings contradict each other.
    """
    if task.endswith((".yaml", ".yml")):
        file = Path(task)
        of_run = file.name == "config.yaml" and is_run(file.parent)
        values = (load_run(file.parent) if of_run else load(file)).config.model_dump()
    elif task.startswith(GYM_PREFIX) or task.endswith(FILE_SUFFIXES):
        values = _values_for(checkpoint, task, options)
    else:
        raise LaunchError(
            f"the task is {task!r}, which is neither a file of prompts nor a configuration",
            hint=f"give a .jsonl or .parquet file with a prompt a row, {GYM_PREFIX}NAME, or a configuration .yaml",
        )
    if values.get("agents"):
        raise LaunchError(
            f"the task is {task!r}, whose trajectories are made by agent programs: eval cannot run these yet",
            hint="the rounds of a run (`eval.every`) are made by its programs; here, give a task without `agents`",
        )
    values["model"]["path"] = checkpoint.model
    values["run"]["name"] = f"eval-{uuid.uuid4().hex}"  # begins the keys of environments: no two evaluations share them
    values["rollout"]["tokens_per_segment"] = None  # there are no iterations
    if options.max_tokens is not None:
        values["data"]["max_tokens"] = options.max_tokens
    values["learner"] = {"tokens_per_microbatch": values["data"]["max_tokens"] + 1}  # nothing is learnt
    if options.reward:
        folders = [Path(), Path(task).parent]
        values["reward"]["functions"] = [{"function": locate(name, folders)} for name in options.reward]
        sources = values["data"]["task"] if isinstance(values["data"]["task"], list) else ()
        for source in (values["data"], *sources):
            source["reward"] = None  # what a source has of its own would come first
    if options.engine is not None:
        values["rollout"]["engine"] = options.engine
    given = {name: getattr(options, name) for name in ("prompts", "temperature", "top_p", "min_tokens")}
    values["eval"] = values["eval"] | {name: value for name, value in given.items() if value is not None}
    if options.stop:
        values["rollout"]["stop"] = list(options.stop)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise LaunchError("; ".join(str(problem["msg"]) for problem in error.errors())) from error
    return settle(config, gpus=local_gpus(), alone=True)


def _values_for(checkpoint: Checkpoint, task: str, options: EvalOptions) -> dict[str, Any]:
    """Settings for a task without a configuration file of its own."""
    run = checkpoint.run
    source = None if run is None else _source_of(run, task)
    if not (options.reward or source or task.startswith(GYM_PREFIX)):
        raise LaunchError(f"{task} does not say how an answer is judged", hint="name a function: --reward MODULE:NAME")
    values: dict[str, Any] = {} if run is None else run.model_dump()
    max_tokens = _default_max_tokens(checkpoint.model) if run is None else run.data.max_tokens
    defaults = {
        "run": {"name": "eval", "iterations": 1},
        "model": {"path": checkpoint.model, "dtype": stored_dtype(checkpoint.model)},
        "eval": {},
        "reward": {},
        "rollout": {},
        "scheduler": {"groups_per_iteration": 4, "tokens_per_iteration": 1},
    }
    found = {**defaults, **values}
    if source is None:
        wording = {name: getattr(run.data, name) for name in WORDING} if run is not None else {}
        data = {"task": task, "max_tokens": max_tokens, **wording}
        return {**found, "data": data, "reward": {**found["reward"], "functions": [{"function": GYM_REWARD}]}}
    own = {name: getattr(source, name) for name in SourceSettings.model_fields}
    own = {name: value for name, value in own.items() if value is not None or name not in WORDING}  # else `data` says
    no_hub = {"config": None, "split": "train"}
    return {**found, "data": {**found["data"], "curriculum": None, **own, **no_hub, "task": task}}


def _source_of(run: Config, task: str) -> SourceConfig | EvalSetConfig | None:
    """The source that a run trains on, or evaluates, whose task this is."""
    sources: list[SourceConfig | EvalSetConfig] = [*run.data.sources, *run.eval.sets.values()]
    return next((source for source in sources if _is_same_task(source.task, task)), None)


def _default_max_tokens(model: str) -> int:
    positions = num_positions(json.loads((Path(model) / "config.json").read_text()))
    return DEFAULT_MAX_TOKENS if positions is None else min(DEFAULT_MAX_TOKENS, max(positions // 2, 1))


def _is_same_task(of_run: str, task: str) -> bool:
    """Whether a task is one that a run has, of which the run records where it is."""
    if not task.endswith(FILE_SUFFIXES):
        return of_run == task
    return Path(of_run).expanduser().resolve() == Path(task).expanduser().resolve()


def _prompts(config: Config, task: str, options: EvalOptions) -> list[Prompt]:
    """All rows of a file, a run's own read as it trains on them; the held-out prompts of anything else."""
    if not task.endswith(FILE_SUFFIXES):
        return make_prompts(config).held_out(config.eval.prompts)
    return read_prompts(config, on_skip=_say)[: options.prompts]


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")


def _samples(
    checkpoint: Checkpoint, config: Config, prompts: Sequence[Prompt], options: EvalOptions
) -> tuple[list[list[Sample]], float]:
    """The scored attempts at each prompt, and the seconds that they took once everything had started."""
    tokenizer = load_tokenizer(config.model.path)
    engine = make_engine_of(checkpoint, config, seed=options.seed)
    with contextlib.closing(engine), RewardRunner(config.reward, config.own_rewards) as runner:
        started = time.monotonic()
        results = generate_and_score(
            engine=engine,
            taker=LeaseTaker(config),
            tokenizer=tokenizer,
            runner=runner,
            prompts=prompts,
            samples=options.samples,
            max_tokens=config.data.max_tokens,
            max_scorings=config.reward.max_attempts,
        )
        return results, time.monotonic() - started


def _ks(options: EvalOptions) -> list[int]:
    ks = sorted(set(options.ks)) or [1 << power for power in range(options.samples.bit_length())]
    if any(not 1 <= k <= options.samples for k in ks):
        raise LaunchError(
            f"--k {ks}: pass@k needs 1 <= k <= --samples ({options.samples})", hint="raise --samples, or lower --k"
        )
    return ks
