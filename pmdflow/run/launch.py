"""Starting a run: Ray, places, actors, and the order in which they end."""

from __future__ import annotations

import os
import sys
from functools import partial

import ray
from ray.exceptions import RayActorError, RayTaskError

from pmdflow.config.load import Loaded
from pmdflow.config.memory import DTYPE_BYTES, held_versions
from pmdflow.config.model_size import measure_model
from pmdflow.config.schema import Config
from pmdflow.dashboard.process import DashboardProcess
from pmdflow.data.inputs import Inputs
from pmdflow.errors import ActorDied, PmdflowError
from pmdflow.metrics.lasting import lasting
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.metrics.sinks.process import SinkProcesses
from pmdflow.metrics.summary import render_summary
from pmdflow.run.actors import LoopMaker, start_archive, start_learners, start_ray, start_store, sweep_programs
from pmdflow.run.controller import Controller
from pmdflow.run.directory import RunDirectory
from pmdflow.run.inputs import merge, open_inputs, open_prompts
from pmdflow.run.learner_group import LearnerGroup
from pmdflow.run.live_versions import LiveVersions
from pmdflow.run.nodes import require_nodes
from pmdflow.run.placement import place_learners, place_rollouts
from pmdflow.run.room import Room
from pmdflow.run.scaling import Scaling, remembered
from pmdflow.run.signals import StopSignals, hangup_ignored
from pmdflow.run.supervision import STARTUP_TIMEOUT_S, Supervisor
from pmdflow.run.telemetry import Telemetry
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import answers, call
from pmdflow.store.creation import failure_of


def up(loaded: Loaded) -> int:
    """Train: start everything, run the controller, stop everything. An existing run directory is resumed.

    Returns:
        0 when the run finished or was drained, 130 when it was stopped at once.

    Raises:
        LaunchError: something that the run needs is missing or taken; nothing was started.
    """
    inputs = _open(loaded)
    with (
        RunDirectory.prepare(inputs.config) as run,
        SinkProcesses.start(run.path, inputs.config.metrics.sinks),
        DashboardProcess.start(run.path, loaded.config.dashboard, output=lasting(sys.stderr)) as dashboard,
    ):
        errors = lasting(sys.stderr)
        with (
            LiveView(config=inputs.config, dashboard_url=dashboard.url) as live,
            StopSignals(drain_s=inputs.config.run.drain_s) as signals,
        ):
            recorder = Recorder(run.path)
            recorder.event("start", f"pmdflow up, process {os.getpid()}")
            try:
                configured, telemetry = loaded.config.rollout.actors, Telemetry(recorder=recorder, live=live)
                finished = _train(inputs, run, telemetry, signals, configured=configured)
            except (KeyboardInterrupt, SystemExit):  # the latter is Ray's answer to SIGTERM while it starts
                recorder.event("stop", signals.reason)
                errors.write(f"{signals.reason}; `{run.resume_command(loaded)}` continues from what is stored\n")
                return 130
            except RayTaskError as error:
                raise PmdflowError(str(error.cause)) from error
            except RayActorError as error:
                raise ActorDied(f"an actor died while the run started: {failure_of(error) or error}") from error
            except OSError as error:
                raise PmdflowError(
                    f"{error.filename or run.path}: {error.strerror or error or type(error).__name__}",
                    hint=f"mend that, and `{run.resume_command(loaded)}` continues from what is stored",
                ) from error
            finally:
                ray.shutdown()
            recorder.event("finish" if finished else "drain", "all iterations are done" if finished else "drained")
        output = lasting(sys.stdout)
        output.write(render_summary(run.path) + "\n")
        output.flush()
        if not finished:
            errors.write(f"drained; `{run.resume_command(loaded)}` continues\n")
    return 0


def _open(loaded: Loaded) -> Inputs:
    """Model and data, judged; what is `auto` decided for the GPUs that there are, on which it all fits."""
    path = RunDirectory.path_of(loaded.config)
    pins = RunDirectory.recorded_inputs(path).get("pins")
    inputs = open_inputs(remembered(path, loaded.config), pins=pins)
    room = Room.of(inputs, dry=False)
    settled = room.settled(inputs)
    room.plan(settled.config)
    return settled


def _weights_bytes(config: Config) -> int | None:
    """Of the published versions that a node holds; adapters are small."""
    size = None if config.learner.lora else measure_model(config.model.path)
    one = None if size is None else size.num_parameters * DTYPE_BYTES[config.model.compute]
    return None if one is None else held_versions(config) * one


def _train(
    inputs: Inputs, run: RunDirectory, telemetry: Telemetry, signals: StopSignals, *, configured: int | str
) -> bool:
    """Run the controller; True if every iteration was done. `configured` is `rollout.actors` as written."""
    config = inputs.config
    merge(inputs, run)
    prompts = open_prompts(config, on_skip=partial(telemetry.event, "prompts_skipped"))
    run.check_inputs(inputs.identity(prompts))
    with hangup_ignored():
        start_ray(config)
    if config.cluster.address != "local":
        require_nodes(run.path, weights_bytes=_weights_bytes(config))
    signals.listen()
    places = place_learners(config)  # before the rollout actors: these share what is left
    rollout_places = place_rollouts(config)

    store = start_store(config, run.path)
    supervisor = Supervisor(store=store, telemetry=telemetry, live=LiveVersions.of(config, store))
    signals.drain(supervisor)
    try:
        maker = LoopMaker(config, run.path, store, rollout_places)
        for loop in maker.all():
            supervisor.start_loop(loop)
        fixed = config.cluster.colocate
        Scaling(run=run.path, supervisor=supervisor, configured=configured, maker=maker, fixed=fixed)
        learners = LearnerGroup(
            supervisor=supervisor,
            start=partial(start_learners, config, run.path, places, supervisor=supervisor),
            on_device=partial(run.write_meta, config),
        )
        controller = Controller(
            config=config,
            run_dir=run.path,
            supervisor=supervisor,
            prompts=prompts,
            learners=learners,
            start_archive=partial(start_archive, config, run.path, store, attrs=run.archive_attrs(config)),
        )
        controller.run()
        supervisor.stop_learners()
        answers([call(store, StoreActor.close)], what="closing the store", timeout_s=STARTUP_TIMEOUT_S)
        sweep_programs(run.path)
        return controller.iteration >= config.run.iterations
    finally:
        signals.over()
