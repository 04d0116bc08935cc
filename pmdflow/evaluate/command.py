"""What `pmdflow eval` evaluates: from a path and a task to an engine with the weights, prompts and a rubric."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from pmdflow.config.installed import require_engine
from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.data.gym import GYM_PREFIX
from pmdflow.data.prompts import make_prompts, read_prompts
from pmdflow.data.tokenizer import load_tokenizer, make_tokenize
from pmdflow.errors import LaunchError
from pmdflow.evaluate.task import evaluate, print_table, summarize, write_results
from pmdflow.learner.checkpoint.manifest import manifest_at, newest_manifest
from pmdflow.reward.runner import RewardRunner
from pmdflow.rollout.engine import RolloutEngine
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.types import Prompt

DEFAULT_MAX_TOKENS = 1024
"""Where neither the command line nor a configuration says how long an answer may be."""
GYM_REWARD = "pmdflow.reward.reasoning_gym:score"
_CHECKPOINT = re.compile(r"iteration-(\d{6,})(\.json)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights to evaluate."""

    model: str
    """Folder in Hugging Face format, for the architecture and the tokenizer."""
    directory: Path | None
    """Files of a run's checkpoint, whose weights replace the folder's; None for the folder's own."""
    version: int
    name: str
    run: Config | None
    """The configuration of its run."""


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
        tokenizer = load_tokenizer(config.model.path)
        engine = _engine(checkpoint, config, seed=options.seed)
        with contextlib.closing(engine), RewardRunner(config.reward) as runner:
            started = time.monotonic()
            results = evaluate(
                engine=engine,
                taker=LeaseTaker(config),
                tokenizer=tokenizer,
                runner=runner,
                prompts=prompts,
                samples=options.samples,
                max_tokens=config.data.max_tokens,
            )
    except ValueError as error:
        raise LaunchError(str(error)) from error
    seconds = time.monotonic() - started
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
    return 0


def find_checkpoint(path: Path) -> Checkpoint:
    """A run directory's newest checkpoint, one of its checkpoints, or a Hugging Face folder.

    Raises:
        LaunchError: it is none of these, or the run has no checkpoint yet.
    """
    path = path.absolute()
    match = _CHECKPOINT.fullmatch(path.name)
    run = path.parent.parent if match else path
    if (run / "config.yaml").is_file() and (run / "run.lock").is_file():
        config = load(run / "config.yaml").config
        root = run / "checkpoints"
        manifest = manifest_at(root, int(match[1])) if match else newest_manifest(root)
        if manifest is None:
            raise LaunchError(f"{run} has no whole checkpoint yet; wait for one, or evaluate {config.model.path}")
        name = f"{run.name}-iteration-{manifest.iteration}"
        return Checkpoint(
            model=config.model.path, directory=manifest.directory, version=manifest.version, name=name, run=config
        )
    if (path / "config.json").is_file():
        return Checkpoint(model=str(path), directory=None, version=0, name=path.name, run=None)
    what = "holds neither a run (config.yaml) nor a model (config.json)" if path.is_dir() else "is no directory"
    raise LaunchError(f"{path} {what}; give a run directory, RUN/checkpoints/iteration-NNNNNN or a Hugging Face folder")


def eval_config(checkpoint: Checkpoint, task: str, options: EvalOptions) -> Config:
    """The settings of the evaluation: those of the task's configuration file or of the run, and the options over them.

    Raises:
        LaunchError: the task is unknown, no reward function is known for it, or the settings contradict each other.
    """
    if task.endswith((".yaml", ".yml")):
        values = load(Path(task)).config.model_dump()
    elif task.startswith(GYM_PREFIX) or task.endswith(".jsonl"):
        values = _values_for(checkpoint, task, options)
    else:
        raise LaunchError(
            f"the task is {task!r}; give a .jsonl file with a prompt a line, {GYM_PREFIX}NAME, or a configuration .yaml"
        )
    values["model"]["path"] = checkpoint.model
    values["run"]["name"] = f"eval-{uuid.uuid4().hex}"  # begins the keys of environments: no two evaluations share them
    if options.max_tokens is not None:
        values["data"]["max_tokens"] = options.max_tokens
    values["learner"] = {"tokens_per_microbatch": values["data"]["max_tokens"] + 1}  # nothing is learnt
    if options.reward:
        values["reward"]["functions"] = [{"function": name} for name in options.reward]
    if options.engine is not None:
        values["rollout"]["engine"] = options.engine
    given = {name: getattr(options, name) for name in ("prompts", "temperature", "top_p", "min_tokens")}
    values["eval"] = values["eval"] | {name: value for name, value in given.items() if value is not None}
    if options.stop:
        values["rollout"]["stop"] = list(options.stop)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise LaunchError("; ".join(str(problem["msg"]) for problem in error.errors())) from error


def _values_for(checkpoint: Checkpoint, task: str, options: EvalOptions) -> dict[str, Any]:
    """Settings for a task without a configuration file of its own."""
    run = checkpoint.run
    same = run is not None and run.data.task == task
    if not (options.reward or same or task.startswith(GYM_PREFIX)):
        raise LaunchError(f"{task} does not say how an answer is judged; name a function with --reward MODULE:NAME")
    values: dict[str, Any] = {} if run is None else run.model_dump()
    max_tokens = DEFAULT_MAX_TOKENS if run is None else run.data.max_tokens
    reward = {"functions": [{"function": GYM_REWARD}]}
    defaults = {
        "run": {"name": "eval", "iterations": 1},
        "model": {"path": checkpoint.model},
        "eval": {},
        "rollout": {},
        "scheduler": {"groups_per_iteration": 4, "tokens_per_iteration": 1},
    }
    data = values["data"] if same else {"task": task, "max_tokens": max_tokens}
    return {**defaults, **values, "data": data, "reward": values["reward"] if same else reward}


def _prompts(config: Config, task: str, options: EvalOptions) -> list[Prompt]:
    """All lines of a `.jsonl` file; the held-out prompts of anything else."""
    if not task.endswith(".jsonl"):
        return make_prompts(config).held_out(config.eval.prompts)
    tokenize = make_tokenize(config.model.path, max_tokens=config.data.max_prompt_tokens)
    return read_prompts(Path(task), tokenize)[: options.prompts]


def _engine(checkpoint: Checkpoint, config: Config, *, seed: int) -> RolloutEngine:
    """The engine, with the checkpoint's weights."""
    from pmdflow.rollout.engines.make import make_engine

    engine = make_engine(config, seed=seed)
    if checkpoint.directory is not None and checkpoint.run is not None:
        from pmdflow.learner.checkpoint.weights import checkpoint_weights

        weights = checkpoint_weights(
            checkpoint.directory, lora=checkpoint.run.learner.lora, tied=_is_tied(checkpoint.model)
        )
        staged = engine.stage(weights)
        engine.pause()
        engine.load_weights(checkpoint.version, staged, on_new_weights="reprefill")
        engine.resume()
    return engine


def _is_tied(model: str) -> bool:
    values: Mapping[str, Any] = json.loads((Path(model) / "config.json").read_text())
    return bool(values.get("tie_word_embeddings", True))


def _ks(options: EvalOptions) -> list[int]:
    ks = sorted(set(options.ks)) or [1 << power for power in range(options.samples.bit_length())]
    if any(not 1 <= k <= options.samples for k in ks):
        raise LaunchError(f"--k {ks}: pass@k needs 1 <= k <= --samples ({options.samples}); raise --samples")
    return ks
