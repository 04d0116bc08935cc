"""How each actor of a run is made: one function a kind."""

from __future__ import annotations

import logging
import os
import sys
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.learner.actor import LearnerActor
from pmdflow.reward.actor import RewardActor
from pmdflow.rollout.actor import RolloutActor
from pmdflow.run.directory import RunDirectory, log_path
from pmdflow.run.supervision import STARTUP_TIMEOUT_S, Loop
from pmdflow.store.actor import StoreActor
from pmdflow.store.settings import StoreSettings

LEARNER_SETUP_TIMEOUT_S = 300.0


def start_ray(config: Config) -> None:
    """Start Ray on this machine, or join the cluster that `cluster.address` names."""
    rollout, learner = config.rollout, config.learner
    cpus = rollout.actors * rollout.threads * rollout.tensor_parallel + learner.ranks * learner.threads
    local = config.cluster.address == "local"
    ray.init(
        address="local" if local else config.cluster.address,
        num_cpus=max(cpus, os.cpu_count() or 1) if local else None,
        include_dashboard=False if local else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def start_store(config: Config, run: RunDirectory) -> Any:
    """The store actor, which Ray restarts as often as it dies."""
    actor = actor_class(StoreActor, max_restarts=-1, max_task_retries=-1, **store_groups(config))
    return actor.remote(
        log_path=log_path(run.path, "store"),
        directory=str(run.path / "store"),
        run_dir=str(run.path),
        settings=store_settings(config),
        archive_attrs=run.archive_attrs(config),
    )


def store_settings(config: Config) -> StoreSettings:
    """The keyword arguments of the trajectory store."""
    straggler = config.scheduler.straggler
    return {
        "groups_per_iteration": config.scheduler.groups_per_iteration,
        "lookahead": config.scheduler.lookahead,
        "max_staleness": config.scheduler.max_staleness,
        "segment_loss": config.learner.segment_loss,
        "min_group_size": config.scheduler.min_group_size,
        "straggler": None if straggler is None else (straggler.members, straggler.wait_s),
        "max_attempts": config.reward.max_attempts,
        "lease_ttl_s": config.rollout.lease_ttl_s,
        "grant_tokens": _grant_tokens(config),
        "durability": config.store.durability,
        "sync_interval_s": config.store.sync_interval_s,
        "max_bytes": config.store.limit_bytes,
    }


def _grant_tokens(config: Config) -> int:
    """Tokens of one grant: many, so that it is extended before it ends; but all held ones leave half of the budget."""
    held = config.rollout.actors * (config.rollout.slots or DEFAULT_SLOTS)
    return min(max(config.scheduler.tokens_per_iteration // (2 * held), 64), 1024)


def start_learners(
    config: Config, run_dir: Path, places: Sequence[dict[str, Any]], *, log_prefix: str = ""
) -> list[Any]:
    """One actor a rank, each in its place, joined into one process group."""
    learners = [
        actor_class(LearnerActor, max_concurrency=3, **place).remote(
            log_path=log_path(run_dir, f"{log_prefix}learner-{rank}"), config=config, rank=rank, run_dir=str(run_dir)
        )
        for rank, place in enumerate(places)
    ]
    master = ray.get(learners[0].address.remote(), timeout=STARTUP_TIMEOUT_S)
    ray.get([learner.setup.remote(master) for learner in learners], timeout=LEARNER_SETUP_TIMEOUT_S)
    return learners


def make_loops(config: Config, run: RunDirectory, store: Any, places: Sequence[dict[str, Any]]) -> list[Loop]:
    """The replaceable actors: one rollout actor a place, and the reward actor."""

    def rollout(index: int) -> Any:
        name = f"rollout-{index}"
        return actor_class(RolloutActor, max_concurrency=8, **places[index]).remote(
            log_path=log_path(run.path, name), config=config, index=index, store=store, run_dir=str(run.path)
        )

    def reward() -> Any:
        actor = actor_class(RewardActor, max_concurrency=4)
        return actor.remote(log_path=log_path(run.path, "reward"), config=config, store=store)

    hang_s = config.rollout.lease_ttl_s
    rollouts = [
        Loop(name=f"rollout-{index}", make=partial(rollout, index), takes_weights=True, hang_timeout_s=hang_s)
        for index in range(config.rollout.actors)
    ]
    return [*rollouts, Loop(name="reward", make=reward, takes_weights=False, hang_timeout_s=hang_s)]


def store_groups(config: Config) -> dict[str, Any]:
    """A waiting call holds a thread of its group: rollout actors wait for leases, everybody else must not."""
    actors = config.rollout.actors
    groups = {"lease": actors + 1, "append": actors + 1, "score": 2, "claim": 2, "archive": 1}
    return {"concurrency_groups": groups, "max_concurrency": 4}


def actor_class(cls: type, **options: Any) -> Any:
    """The Ray actor class of `cls`, whose processes write their output to the run's `logs/`."""
    initialize: Any = vars(cls)["__init__"]

    def start(self: Any, *, log_path: str, **arguments: Any) -> None:
        Path(log_path).parent.mkdir(exist_ok=True)  # a copied run directory may come without its logs
        with open(log_path, "ab", buffering=0) as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        initialize(self, **arguments)

    logged = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update({"__init__": start}))
    return ray.remote(**{"num_cpus": 0, **options})(logged)
