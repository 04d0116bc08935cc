"""Starting, stopping and showing runs: Ray, placement, actors, the run directory's lock."""

from __future__ import annotations

import logging
import os
import signal
import sys
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from pmdflow.config.load import Loaded
from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.controller import Controller
from pmdflow.dashboard.process import DashboardProcess
from pmdflow.data import PromptSource, make_prompts
from pmdflow.errors import LaunchError, PmdflowError
from pmdflow.learner.actor import LearnerActor
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.metrics.summary import render_summary
from pmdflow.placement import place_learners, place_rollouts
from pmdflow.reward.actor import RewardActor
from pmdflow.rollout.actor import RolloutActor
from pmdflow.run_directory import RunDirectory, log_path
from pmdflow.store_actor import StoreActor
from pmdflow.supervision import STARTUP_TIMEOUT_S, Loop, Supervisor

LEARNER_SETUP_TIMEOUT_S = 300.0


def up(loaded: Loaded) -> int:
    """Train: start everything, run the controller, stop everything. An existing run directory is resumed.

    Returns:
        0 when the run finished or was drained, 130 when it was stopped at once.

    Raises:
        LaunchError: something that the run needs is missing or taken; nothing was started.
    """
    config = loaded.config
    with RunDirectory.prepare(config) as run, DashboardProcess.start(run.path, config.dashboard.port) as dashboard:
        with LiveView(config=config, dashboard_url=dashboard.url) as live:
            recorder = Recorder(run.path)
            recorder.event("start", f"pmdflow up, process {os.getpid()}")
            try:
                finished = _train(config, run, recorder, live)
            except KeyboardInterrupt:
                recorder.event("stop", "stopped at once")
                sys.stderr.write(f"stopped at once; `{run.resume_command(loaded)}` continues from what is stored\n")
                return 130
            except RayTaskError as error:
                raise PmdflowError(str(error.cause)) from error
            except OSError as error:
                raise PmdflowError(
                    f"{error.filename or run.path}: {error.strerror}; mend that, and "
                    f"`{run.resume_command(loaded)}` continues from what is stored"
                ) from error
            finally:
                ray.shutdown()
            recorder.event("finish" if finished else "drain", "all iterations are done" if finished else "drained")
        sys.stdout.write(render_summary(run.path) + "\n")
        if not finished:
            sys.stderr.write(f"drained; `{run.resume_command(loaded)}` continues\n")
    return 0


def down(run: Path) -> int:
    """Ask the `up` process of a run to drain."""
    pid = RunDirectory.owner(run)
    if pid is None:
        sys.stderr.write(f"{run} is not running\n")
        return 1
    os.kill(pid, signal.SIGINT)
    sys.stdout.write(f"asked process {pid} to drain {run}\n")
    return 0


def status(run: Path) -> int:
    """Print whether a run is going on, and its newest numbers."""
    pid = RunDirectory.owner(run)
    sys.stdout.write(f"{run}: {'not running' if pid is None else f'running, process {pid}'}\n")
    sys.stdout.write(render_summary(run) + "\n")
    return 0


def _train(config: Config, run: RunDirectory, recorder: Recorder, live: LiveView) -> bool:
    """Run the controller; True if every iteration was done."""
    start_ray(config)
    places = place_learners(config)  # before the rollout actors: these share what is left
    rollout_places = place_rollouts(config)

    def start() -> list[Any]:
        learners = start_learners(config, run.path, places)
        run.write_meta(config, ray.get(learners[0].device_info.remote(), timeout=STARTUP_TIMEOUT_S))
        return learners

    store = _actor(StoreActor, max_restarts=-1, max_task_retries=-1, **_store_groups(config)).remote(
        log_path=log_path(run.path, "store"),
        directory=str(run.path / "store"),
        run_dir=str(run.path),
        settings=store_settings(config),
        archive_attrs=run.archive_attrs(config),
    )
    supervisor = Supervisor(store=store, recorder=recorder, live=live)
    previous = signal.signal(signal.SIGINT, partial(_interrupt, supervisor))
    try:
        for loop in _loops(config, run, store, rollout_places):
            supervisor.start_loop(loop)
        controller = Controller(
            config=config,
            run_dir=run.path,
            supervisor=supervisor,
            prompts=_prompts(config),  # while the actors start
            start_learners=start,
        )
        controller.run()
        supervisor.stop_learners()
        ray.get(store.close.remote(), timeout=STARTUP_TIMEOUT_S)
        return controller.iteration >= config.run.iterations
    finally:
        signal.signal(signal.SIGINT, previous)


def _prompts(config: Config) -> PromptSource:
    try:
        return make_prompts(config)
    except ValueError as error:
        raise LaunchError(str(error)) from error


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


def store_settings(config: Config) -> dict[str, Any]:
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
        "commit_interval_s": config.store.commit_interval_s,
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
        _actor(LearnerActor, max_concurrency=3, **place).remote(
            log_path=log_path(run_dir, f"{log_prefix}learner-{rank}"), config=config, rank=rank, run_dir=str(run_dir)
        )
        for rank, place in enumerate(places)
    ]
    master = ray.get(learners[0].address.remote(), timeout=STARTUP_TIMEOUT_S)
    ray.get([learner.setup.remote(master) for learner in learners], timeout=LEARNER_SETUP_TIMEOUT_S)
    return learners


def _loops(config: Config, run: RunDirectory, store: Any, places: Sequence[dict[str, Any]]) -> list[Loop]:
    def rollout(index: int) -> Any:
        name = f"rollout-{index}"
        return _actor(RolloutActor, max_concurrency=8, **places[index]).remote(
            log_path=log_path(run.path, name), config=config, index=index, store=store, run_dir=str(run.path)
        )

    def reward() -> Any:
        actor = _actor(RewardActor, max_concurrency=4)
        return actor.remote(log_path=log_path(run.path, "reward"), config=config, store=store)

    hang_s = config.rollout.lease_ttl_s
    rollouts = [
        Loop(name=f"rollout-{index}", make=partial(rollout, index), takes_weights=True, hang_timeout_s=hang_s)
        for index in range(config.rollout.actors)
    ]
    return [*rollouts, Loop(name="reward", make=reward, takes_weights=False, hang_timeout_s=hang_s)]


def _store_groups(config: Config) -> dict[str, Any]:
    """A waiting call holds a thread of its group: rollout actors wait for leases, everybody else must not."""
    actors = config.rollout.actors
    groups = {"lease": actors + 1, "append": actors + 1, "score": 2, "claim": 2, "archive": 1}
    return {"concurrency_groups": groups, "max_concurrency": 4}


def _actor(cls: type, **options: Any) -> Any:
    """The Ray actor class of `cls`, whose processes write their output to the run's `logs/`."""
    initialize: Any = vars(cls)["__init__"]

    def start(self: Any, *, log_path: str, **arguments: Any) -> None:
        with open(log_path, "ab", buffering=0) as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        initialize(self, **arguments)

    logged = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update({"__init__": start}))
    return ray.remote(**{"num_cpus": 0, **options})(logged)


def _interrupt(supervisor: Supervisor, signum: int, frame: types.FrameType | None) -> None:
    """First Ctrl-C drains, the second stops at once."""
    if supervisor.draining:
        raise KeyboardInterrupt
    supervisor.draining = True
    supervisor.live.event("drain", "draining: finishing the iteration, then stopping; press Ctrl-C again to stop now")
