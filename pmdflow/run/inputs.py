"""What a run is made from, found and judged before anything starts: the model's folder, the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from pmdflow.config.errors import dotted
from pmdflow.config.load import Loaded, leaves
from pmdflow.config.never_run import never_run
from pmdflow.config.plan import render_dry_run
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.data.inputs import MERGED_FROM, Inputs, resolve_inputs
from pmdflow.data.mixture import MixedPrompts
from pmdflow.data.model_folder import read_json
from pmdflow.data.prompts import make_prompts
from pmdflow.errors import LaunchError, PmdflowError
from pmdflow.run.directory import RunDirectory
from pmdflow.run.room import Room
from pmdflow.run.simulation.command import short_advice

ADVICE_S = 3.0
"""Time in which the dry run looks for something better."""
MERGED = "model"
"""Folder of a run directory for an adapter that is merged with its base model."""


def open_inputs(config: Config, *, pins: Mapping[str, str] | None = None, weights: bool = True) -> Inputs:
    """Find the model and the data sets, download what is not there, and refuse a model that cannot be trained.

    Args:
        config: As written.
        pins: Commits that the run was begun with.
        weights: Also download the weights of a Hub model.

    Raises:
        LaunchError: something is missing, not whole, or cannot be trained.
    """
    try:
        inputs = resolve_inputs(config, merged=RunDirectory.path_of(config) / MERGED, pins=pins, weights=weights)
        from pmdflow.learner.loading import check_family, check_loading  # torch takes seconds; the files were judged

        engine = settle(config, gpus=None).rollout.engine
        check_family(inputs.base, packing=config.learner.packing, slots=engine == "transformers")
        if config.learner.context_parallel > 1:
            from pmdflow.learner.context import require_folder_divisible

            require_folder_divisible(inputs.base, config.learner.context_parallel)
        if inputs.has_weights:
            check_loading(inputs.base)
        if ":" not in config.learner.algorithm:  # what a user's module does is known where it is imported
            from pmdflow.learner.algorithms import find_algorithm

            find_algorithm(config.learner.algorithm).configured(config.learner)
    except ValueError as error:
        raise _refusal(error) from error
    return inputs


def merge(inputs: Inputs, run: RunDirectory) -> None:
    """Merge an adapter with its base model, once; what a start that failed has merged from others is merged anew.

    Raises:
        LaunchError: the adapter does not fit its base model, or the run was begun with another one.
    """
    out = Path(inputs.config.model.path)
    if inputs.adapter is None:
        return
    try:
        if out.is_dir():
            made_of = read_json(out / MERGED_FROM) if (out / MERGED_FROM).is_file() else None
            if made_of == inputs.model or (made_of is None and run.has_store()):  # earlier releases noted nothing
                return
            if run.has_store():
                raise ValueError(
                    f"{run.path} was begun with another adapter, or another base model, than model.path names now; "
                    "resume with those, or choose another run.name"
                )
        from pmdflow.learner.adapter import merge_adapter

        merge_adapter(inputs)
    except ValueError as error:
        raise _refusal(error) from error


def open_prompts(config: Config, *, on_skip: Callable[[str], None]) -> MixedPrompts:
    """Read and check the data.

    Raises:
        LaunchError: names the row, the file or the setting.
    """
    try:
        return make_prompts(config, on_skip=on_skip)
    except ValueError as error:
        raise _refusal(error) from error


def dry_run(loaded: Loaded) -> str:
    """What `up --dry-run` prints; reads model and data as `up` does, but downloads no weights and starts nothing.

    Raises:
        LaunchError: as `up` would.
    """
    pins = RunDirectory.recorded_inputs(RunDirectory.path_of(loaded.config)).get("pins")
    inputs = open_inputs(loaded.config, pins=pins, weights=False)
    room = Room.of(inputs, dry=True)
    settled = room.settled(inputs).config
    plan = room.plan(settled)
    config = settled.model_copy(update={"model": settled.model.model_copy(update={"path": str(inputs.base)})})
    notes: list[str] = [*room.notes, *never_run(settled, room.gpus)]
    worded = config.model_copy(update={"model": config.model.model_copy(update={"path": str(inputs.tokenizer)})})
    prompts = open_prompts(worded, on_skip=notes.append)
    if not inputs.has_weights:
        notes.append(f"the weights of {loaded.config.model.path} are downloaded by `up`")
    try:
        advice = short_advice(config, seconds=ADVICE_S)
    except PmdflowError as error:
        advice = [f"none: {error}"]
    notes += algorithm_notes(config)
    origins = _settled_origins(loaded, settled)
    shown = replace(loaded, config=config, origins=origins)
    return render_dry_run(shown, plan, model=room.model, data=prompts.summary, advice=advice, notes=notes)


def _settled_origins(loaded: Loaded, settled: Config) -> dict[str, str]:
    """Where each setting comes from; of what was decided for this machine, that it was."""
    before, after = (dict(leaves(config.model_dump())) for config in (loaded.config, settled))
    decided = {dotted(key) for key, value in before.items() if value in ("auto", None) and after.get(key) != value}
    return {key: f"auto, {origin}" if key in decided else origin for key, origin in loaded.origins.items()}


def algorithm_notes(config: Config) -> list[str]:
    """What the algorithm costs beside its steps.

    Raises:
        LaunchError: it is not there, or has no such setting.
    """
    from pmdflow.learner.algorithms import find_algorithm

    try:
        algorithm = find_algorithm(config.learner.algorithm)
        algorithm.configured(config.learner)
    except ValueError as error:
        raise _refusal(error) from error
    if not algorithm.needs or config.learner.ranks == 1 or not (algorithm.claim_wide or algorithm.state):
        return []
    tokens = config.scheduler.groups_per_iteration * config.data.group_size * config.data.max_tokens
    size = tokens * 4 * len(algorithm.needs) / 2**20
    needs = ", ".join(sorted(algorithm.needs))
    return [f"the algorithm sees the whole claim: each rank gathers {needs} of {tokens:,} tokens, {size:,.3g} MiB"]


def _refusal(error: ValueError) -> LaunchError:
    """The remedy of a single reason follows its last semicolon; several reasons have one each."""
    text, _, remedy = str(error).rpartition("; ")
    return LaunchError(text, hint=remedy) if text and "\n" not in str(error) else LaunchError(str(error))
