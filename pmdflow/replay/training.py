"""A new run, trained from the stored rollouts of another alone: no rollout actor, not one new token."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from pmdflow import durable
from pmdflow.config.load import load_run
from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError, PmdflowError
from pmdflow.learner.actor import LearnerActor
from pmdflow.learner.checkpoint.manifest import Manifest, commit_checkpoint, newest_manifest, prune
from pmdflow.learner.result import TrainResult
from pmdflow.metrics.claim import claim_metrics
from pmdflow.metrics.recorder import Recorder
from pmdflow.replay.claims import STEP_TIMEOUT_S, claim_to_train
from pmdflow.replay.rescoring import Rescorer, rewards_differ
from pmdflow.run.actors import start_learners, start_ray
from pmdflow.run.directory import RunDirectory
from pmdflow.run.placement import place_learners
from pmdflow.store.archive import part_path, parts, read_attrs, read_part, read_table, write_part
from pmdflow.store.client import call
from pmdflow.types import Claim, TrainBatch

PROVENANCE = "provenance.json"
STORED = -1
"""Version of a claim that no policy of the new run generated a token of: no token counts as its newest."""


def train_on_stored(run: Path, out: Path, overrides: Sequence[str]) -> int:
    """Train `out` on the archived claims of `run`, one an iteration, again from the first when all were trained.

    What other weights generated is corrected by importance weights of tokens, unless an override says otherwise or the
    loss does so itself. Where other functions judge than in `run`, every claim is judged anew before it is trained. It
    is archived in `out` first, so that a run which was killed goes on by the same call and ends the same.

    Raises:
        PmdflowError: `run` holds no claim, or `out` was begun with other claims or settings.
    """
    sources = _sources(run, out)
    recorded = load_run(run).config
    config = _settings(run, out, overrides, iterations=len(sources))
    provenance = _provenance(run, sources, config)
    _refuse_other(out, provenance)
    durable.make_directories(out)
    durable.write(out / PROVENANCE, json.dumps(provenance, indent=1) + "\n")
    with RunDirectory.prepare(config) as directory, ExitStack() as stack:
        differ = rewards_differ(config, recorded)
        rescorer = stack.enter_context(_rescorer(config, sources)) if differ else None
        recorder = stack.enter_context(Recorder(directory.path))
        start_ray(config)
        stack.callback(ray.shutdown)
        learners = start_learners(config, directory.path, place_learners(config))
        directory.write_meta(config, ray.get(call(learners[0], LearnerActor.device_info), timeout=STEP_TIMEOUT_S))
        done = _resume(learners, directory.path)
        recorder.event("start", f"trained on {len(sources)} claims of {run}, from iteration {done}")
        dealt_anew = config.learner.steps_per_iteration != recorded.learner.steps_per_iteration
        for iteration in range(done + 1, config.run.iterations + 1):
            source = sources[(iteration - 1) % len(sources)]
            if not part_path(directory.path, iteration).is_dir():
                batch = replace(claim_to_train(source, anew=config if dealt_anew else None), iteration=iteration)
                batch = batch if rescorer is None else rescorer.judge(batch)
                attrs = {**directory.archive_attrs(config), "source": source.name}
                write_part(directory.path, replace(batch, version=STORED), attrs=attrs)
            _train(learners, read_part(part_path(directory.path, iteration)), recorder, directory.path, config)
        recorder.event("finish", f"{config.run.iterations} iterations")
    print(f"{out}: {config.run.iterations} iterations on {len(sources)} claims; `pmdflow eval {out}` evaluates it")  # noqa: T201
    return 0


def _settings(run: Path, out: Path, overrides: Sequence[str], *, iterations: int) -> Config:
    given = {override.partition("=")[0] for override in overrides}
    own = [f"run.name={json.dumps(out.name)}", f"run.dir={json.dumps(str(out.parent))}"]
    if "run.iterations" not in given:
        own.append(f"run.iterations={iterations}")
    config = load_run(run, [*overrides, *own]).config
    learner = config.learner
    corrects = learner.importance_weights != "none" or learner.anchor == "behavior" or learner.algorithm == "ctpo"
    if corrects or "learner.importance_weights" in given:
        return config
    return load_run(run, [*overrides, *own, "learner.importance_weights=token"]).config


def _sources(run: Path, out: Path) -> list[Path]:
    """The claims to train on: all that there are, or those that `out` was begun with, for a live run has more now."""
    found, path = parts(run), out / PROVENANCE
    if not found:
        raise PmdflowError(f"{run}/archive holds no claim", hint="claims are archived when a checkpoint is committed")
    if not path.is_file():
        return found
    begun = [name for name, _ in json.loads(path.read_text())["parts"]]
    return [part for part in found if part.name in begun]


def _provenance(run: Path, sources: Sequence[Path], config: Config) -> dict[str, Any]:
    """What makes the same run again: the claims by content, and the settings that training depends on."""
    settings = config.model_dump(mode="json", include={"model", "data", "reward", "learner"})
    settings["learner"].pop("keep_checkpoints")
    return {
        "run": str(run),
        "parts": [[path.name, read_attrs(path)["digest"]] for path in sources],
        "settings_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }


def _refuse_other(out: Path, provenance: dict[str, Any]) -> None:
    """Refuse to go on with another run; before anything is written.

    Raises:
        LaunchError: says what differs.
    """
    path = out / PROVENANCE
    if not path.is_file():
        if (out / "config.yaml").exists():
            raise LaunchError(f"{out} holds a run that generated its rollouts", hint="choose another OUT")
        return
    before = json.loads(path.read_text())
    for name, what in (("parts", "other stored claims"), ("settings_sha256", "other settings")):
        if before[name] != provenance[name]:
            raise LaunchError(f"{out} was begun with {what}", hint="choose another OUT, or remove it")


def _rescorer(config: Config, sources: Sequence[Path]) -> Rescorer:
    tables = [read_table(path, "group", ["id", "prompt_id"]) for path in sources]
    ids = {str(name) for table in tables for name in table["prompt_id"]}
    return Rescorer(config, prompt_ids=ids, last_group=max(int(table["id"].max(initial=0)) for table in tables))


def _resume(learners: Sequence[ActorHandle[LearnerActor]], out: Path) -> int:
    """Iterations trained; every rank has the state of then."""
    manifest = newest_manifest(out / "checkpoints")
    if manifest is None:
        loads = [call(learner, LearnerActor.load_initial) for learner in learners]
    else:
        loads = [call(learner, LearnerActor.load, str(manifest.directory)) for learner in learners]
    ray.get(loads, timeout=STEP_TIMEOUT_S)
    return 0 if manifest is None else manifest.iteration


def _train(
    learners: Sequence[ActorHandle[LearnerActor]], batch: TrainBatch, recorder: Recorder, out: Path, config: Config
) -> None:
    started, iteration = time.perf_counter(), batch.iteration
    stored = ray.put(batch)
    results: list[TrainResult] = ray.get(
        [learner.train_batch.remote(stored) for learner in learners], timeout=STEP_TIMEOUT_S
    )
    result = results[0]
    recorder.metric(
        "iteration",
        {
            "iteration": iteration,
            "version": iteration,
            **claim_metrics(Claim.of(batch)),
            **result.metrics,
            **result.speed,
            "time/iteration_s": time.perf_counter() - started,
        },
    )
    loss, reward = result.metrics["learner/loss"], result.metrics["reward/total_mean"]
    said = f"iteration {iteration} of {config.run.iterations}: loss {loss:+.5f}, stored reward {reward:.4f}"
    print(said, file=sys.stderr)  # noqa: T201
    if iteration % config.learner.checkpoint_every and iteration != config.run.iterations:
        return
    manifest = Manifest.new(out / "checkpoints", iteration=iteration, version=iteration, lsn=0)
    saves = [call(learner, LearnerActor.save, str(manifest.writing)) for learner in learners]
    ray.get(saves, timeout=STEP_TIMEOUT_S)
    written = ray.get([call(learner, LearnerActor.await_saved) for learner in learners], timeout=STEP_TIMEOUT_S)
    commit_checkpoint(manifest.root, manifest, chain.from_iterable(written))
    prune(manifest.root, config.learner.keep_checkpoints)
