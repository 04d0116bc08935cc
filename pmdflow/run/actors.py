"""How each actor of a run is made: one function a kind."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
import types
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pmdflow.agents.gateway import Gateway
from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError, WaitTimeout
from pmdflow.learner.actor import LearnerActor
from pmdflow.learner.scorers.actor import ScorerActor
from pmdflow.reward.actor import RewardActor
from pmdflow.rollout.actor import RolloutActor
from pmdflow.rollout.launching import AgentsPlace
from pmdflow.run.cluster import ask_cluster
from pmdflow.run.directory import log_path
from pmdflow.run.loops import Loop, LoopHandle
from pmdflow.run.nodes import worker_environment
from pmdflow.run.placement import ActorOptions, another_place, needs, place_rewards, place_scorer
from pmdflow.run.scaling import with_actors
from pmdflow.run.scheduler import grant_tokens
from pmdflow.run.store_place import StorePlace
from pmdflow.run.supervision import STARTUP_TIMEOUT_S, Supervisor
from pmdflow.store.actor import StoreActor
from pmdflow.store.archive.actor import ArchiveActor
from pmdflow.store.client import StoreHandle, answers, call
from pmdflow.store.creation import failures_told
from pmdflow.store.settings import StoreSettings
from pmdflow.weights.transport import THREADS, WeightsHandle

LEARNER_SETUP_TIMEOUT_S = 300.0
START_TRIES = 2
"""A busy machine does not start Ray's processes within its own fixed 30 s, and the next time finds them in memory."""
SCALE_ROOM = 2
"""A run may be scaled to about so many times its rollout actors before they wait for each other at the store."""
MOST_READERS = 4
"""Learner ranks that the store actor serves tokens at once: each has a part of a claim in its memory."""

Actor = TypeVar("Actor")


def start_ray(config: Config) -> None:
    """Start Ray on this machine, or join the cluster that `cluster.address` names.

    Raises:
        LaunchError: Ray does not start here, or none answers there in time.
    """
    rollout, learner = config.rollout, config.learner
    cpus = rollout.num_actors * rollout.threads * rollout.tensor_parallel + learner.num_ranks * learner.threads
    cpus += sum(scorer.actors * scorer.threads for scorer in learner.scorers_when("complete").values())
    local = config.cluster.address == "local"
    given = worker_environment({} if local else os.environ, config.cluster.env)
    if not local:
        ask_cluster(config.cluster.address)
    for again in range(START_TRIES - 1, -1, -1):
        try:
            ray.init(
                address="local" if local else config.cluster.address,
                num_cpus=max(cpus, os.cpu_count() or 1) if local else None,
                include_dashboard=False if local else None,
                log_to_driver=False,
                runtime_env={"env_vars": given} if given else None,
                logging_level=logging.CRITICAL if again else logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises bare ones where the machine is busy, or its files have no place
            ray.shutdown()
            if not again:
                raise LaunchError(
                    f"Ray does not start: {str(error).strip().splitlines()[0]}",
                    hint="it keeps its files in /tmp/ray, or below RAY_TMPDIR: a short path on a disk with free space; "
                    "where the machine is busy, try again",
                ) from error


def start_store(config: Config, run_dir: Path) -> StoreHandle:
    """The store actor in the `StorePlace` of the run; Ray restarts it as often as it dies."""
    place = StorePlace.find(config, run_dir)
    return make_actor(
        StoreActor,
        log=log_path(run_dir, "store"),
        options={"max_restarts": -1, "max_task_retries": -1, **place.options(), **_store_threads(config)},
        arguments={
            "directory": str(place.directory),
            "settings": store_settings(config),
            "steps_per_iteration": config.learner.steps_per_iteration,
            "seed": config.run.seed,
        },
    )


def start_archive(
    config: Config, run_dir: Path, store: StoreHandle, *, attrs: Mapping[str, object]
) -> ActorHandle[ArchiveActor]:
    """The archive actor, where the store is; Ray restarts it as often as it dies."""
    asked = [call(store, StoreActor.node)]
    (node,) = answers(asked, what="the start of the store actor", timeout_s=STARTUP_TIMEOUT_S)
    return make_actor(
        ArchiveActor,
        log=log_path(run_dir, "archive"),
        options={
            "max_restarts": -1,
            "max_task_retries": -1,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=config.store.dir is None),
        },
        arguments={
            "directory": str(run_dir / "store"),
            "run_dir": str(run_dir),
            "attrs": attrs,
            "steps_per_iteration": config.learner.steps_per_iteration,
        },
    )


def start_rollout(
    config: Config,
    run_dir: Path,
    store: StoreHandle,
    place: ActorOptions,
    *,
    index: int,
    worker: str,
    agents: AgentsPlace | None = None,
) -> ActorHandle[RolloutActor]:
    """Rollout actor number `index` in its place, known as `worker`; its `run` is still to be called."""
    return make_actor(
        RolloutActor,
        log=log_path(run_dir, f"rollout-{index}"),
        options={"max_concurrency": 8, "concurrency_groups": THREADS, "name": worker, **place},
        arguments={
            "config": config,
            "index": index,
            "store": store,
            "run_dir": str(run_dir),
            "worker": worker,
            "agents": agents,
        },
    )


def store_settings(config: Config) -> StoreSettings:
    """The keyword arguments of the trajectory store."""
    straggler, curriculum = config.scheduler.straggler, config.data.curriculum
    return {
        "groups_per_iteration": config.scheduler.groups_per_iteration,
        "lookahead": config.scheduler.lookahead,
        "max_staleness": config.scheduler.max_staleness,
        "segment_loss": config.learner.segment_loss,
        "window": config.scheduler.window,
        "signal": (config.learner.keep_groups_above, config.learner.keep_groups_below)
        if config.scheduler.refill
        else None,
        "successes": None if curriculum is None else (curriculum.decay, curriculum.success_reward),
        "min_group_size": config.scheduler.min_group_size,
        "one_version": config.scheduler.versions is not None,
        "straggler": None if straggler is None else (straggler.members, straggler.wait_s),
        "scorers": list(config.learner.scorers_when("complete")),
        "max_attempts": config.reward.max_attempts,
        "lease_ttl_s": config.rollout.lease_ttl_s,
        "grant_tokens": grant_tokens(config),
        "durability": config.store.durability,
        "sync_interval_s": config.store.sync_interval_s,
        "max_bytes": config.store.limit_bytes,
    }


def start_learners(
    config: Config,
    run_dir: Path,
    places: Sequence[ActorOptions],
    *,
    log_prefix: str = "",
    supervisor: Supervisor | None = None,
) -> list[ActorHandle[LearnerActor]]:
    """One actor a rank, each in its place, joined into one process group; `supervisor` looks after others meanwhile."""
    learners = [
        make_actor(
            LearnerActor,
            log=log_path(run_dir, f"{log_prefix}learner-{rank}"),
            options={"max_concurrency": 3, "concurrency_groups": THREADS, **place},
            arguments={"config": config, "rank": rank, "run_dir": str(run_dir)},
        )
        for rank, place in enumerate(places)
    ]
    try:
        _join(learners, supervisor, needs(places[0]))
    except BaseException:
        for learner in learners:  # or those that have begun keep the places of the next ones
            ray.kill(learner)
        raise
    return learners


def _join(learners: Sequence[ActorHandle[LearnerActor]], supervisor: Supervisor | None, each_needs: str) -> None:
    """Wait until all ranks are one process group."""
    wait = answers if supervisor is None else supervisor.wait
    if supervisor is not None:
        supervisor.await_places(learners, what="learner ranks", needs=each_needs)
    asked = [call(learners[0], LearnerActor.address)]
    (master,) = wait(asked, what="the start of learner rank 0", timeout_s=STARTUP_TIMEOUT_S)
    setups = [call(learner, LearnerActor.setup, master) for learner in learners]
    try:
        wait(setups, what="the setup of the learner ranks", timeout_s=LEARNER_SETUP_TIMEOUT_S)
    except WaitTimeout as error:
        raise WaitTimeout(
            str(error),
            hint="where they do not reach each other, name the network's interface in cluster.env, as "
            "{GLOO_SOCKET_IFNAME: eth0, NCCL_SOCKET_IFNAME: eth0}; logs/learner-0.log says how far they are",
        ) from error


class LoopMaker:
    """Makes the replaceable actors of a run, none of them started: gateway, rollout and reward actors."""

    def __init__(self, config: Config, run_dir: Path, store: StoreHandle, places: Sequence[ActorOptions]) -> None:
        """`places` are those of the rollout actors that the run begins with."""
        self._config = config
        self._run_dir = run_dir
        self._store = store
        self._places = dict(enumerate(places))
        self._rollouts: dict[int, Loop] = {}
        self._gateways, self._agents = make_gateway(config, run_dir)

    def all(self) -> list[Loop]:
        """Those that the run begins with; reward actors are spread over the nodes."""
        rewards = [self._reward(index, place) for index, place in enumerate(place_rewards(self._config))]
        scorers = make_scorers(self._config, self._run_dir, self._store)
        return [*self._gateways, *map(self.rollout, range(self._config.rollout.num_actors)), *scorers, *rewards]

    def rollout(self, index: int) -> Loop:
        """Rollout actor number `index`, the same each time: its processes are counted, so that no two share a name."""
        if index not in self._rollouts:
            if index not in self._places:
                self._places[index] = another_place(self._config, self._places[0])
            self._rollouts[index] = Loop(
                name=f"rollout-{index}",
                start=partial(self._start_rollout, index),
                takes_weights=True,
                hang_timeout_s=self._config.rollout.lease_ttl_s,
                needs=needs(self._places[index]),
            )
        return self._rollouts[index]

    def scaled(self, number: int) -> None:
        """There are so many rollout actors from now on: tell them, and those that are started."""
        self._config = with_actors(self._config, number)
        for loop in self._rollouts.values():
            if loop.running is not None:
                call(loop.process.actor, RolloutActor.share_programs, number)

    def _start_rollout(
        self, index: int, weights: WeightsHandle | None, worker: str
    ) -> tuple[LoopHandle, ObjectRef[object]]:
        config, place = self._config, self._places[index]
        actor = start_rollout(
            config, self._run_dir, self._store, place, index=index, worker=worker, agents=self._agents
        )
        return actor, call(actor, RolloutActor.run, weights)

    def _reward(self, index: int, place: ActorOptions) -> Loop:
        def start(_: WeightsHandle | None, worker: str) -> tuple[LoopHandle, ObjectRef[object]]:
            actor = make_actor(
                RewardActor,
                log=log_path(self._run_dir, f"reward-{index}"),
                options={"max_concurrency": 4, **place},
                arguments={"config": self._config, "index": index, "store": self._store},
            )
            return actor, call(actor, RewardActor.run)

        return Loop(
            name=f"reward-{index}", start=start, takes_weights=False, hang_timeout_s=self._config.rollout.lease_ttl_s
        )


def make_scorers(config: Config, run_dir: Path, store: StoreHandle) -> list[Loop]:
    """The actors that score complete trajectories, by `learner.scorers`."""

    def scorer(
        name: str, index: int, weights: WeightsHandle | None, worker: str
    ) -> tuple[LoopHandle, ObjectRef[object]]:
        actor = make_actor(
            ScorerActor,
            log=log_path(run_dir, f"scorer-{name}-{index}"),
            options={"max_concurrency": 4, **place_scorer(config.learner.scorers[name])},
            arguments={"config": config, "name": name, "index": index, "store": store, "run_dir": str(run_dir)},
        )
        return actor, call(actor, ScorerActor.run)

    return [
        Loop(
            name=f"scorer-{name}-{index}",
            start=partial(scorer, name, index),
            takes_weights=False,
            hang_timeout_s=config.rollout.lease_ttl_s,
            needs=needs(place_scorer(given)),
        )
        for name, given in config.learner.scorers_when("complete").items()
        for index in range(given.actors)
    ]


def sweep_programs(run_dir: Path) -> None:
    """Remove what agent programs have left whose rollout actors were killed."""
    shutil.rmtree(run_dir / "agents", ignore_errors=True)


def make_gateway(config: Config, run_dir: Path) -> tuple[list[Loop], AgentsPlace | None]:
    """The gateway of agent programs on this machine, and where they find it; none where the run has no agents."""
    if config.agents is None:
        return [], None
    given, secret = config.agents, secrets.token_bytes(32)
    sweep_programs(run_dir)
    with socket.socket(socket.AF_INET6 if ":" in given.host else socket.AF_INET) as probe:
        probe.bind((given.host, given.port))
        port = probe.getsockname()[1]
    everywhere = given.host in ("0.0.0.0", "::")  # noqa: S104
    host = ray.util.get_node_ip_address() if everywhere else given.host
    node = ray.get_runtime_context().get_node_id()

    def gateway(_: WeightsHandle | None, worker: str) -> tuple[LoopHandle, ObjectRef[object]]:
        actor = make_actor(
            Gateway,
            log=log_path(run_dir, "gateway"),
            options={"max_concurrency": 4, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)},
            arguments={"config": given, "model": config.run.name, "secret": secret, "port": port},
        )
        return actor, call(actor, Gateway.run)

    loop = Loop(name="gateway", start=gateway, takes_weights=False, hang_timeout_s=config.rollout.lease_ttl_s)
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return [loop], AgentsPlace(address=address, secret=secret)


def _store_threads(config: Config) -> ActorOptions:
    """A waiting call holds a thread of its group: rollout actors wait for leases, everybody else must not."""
    actors = config.rollout.num_actors
    scorers = sum(scorer.actors for scorer in config.learner.scorers_when("complete").values())
    groups = {
        "lease": SCALE_ROOM * actors + 8,
        "append": SCALE_ROOM * actors + 8,
        "score": config.reward.actors + scorers + 1,
        "claim": 2,
        "read": min(config.learner.num_ranks, MOST_READERS),
        "evict": 1,
    }
    return {"concurrency_groups": groups, "max_concurrency": 4}


def make_actor(
    cls: type[Actor], *, log: str, options: ActorOptions, arguments: Mapping[str, object]
) -> ActorHandle[Actor]:
    """Start `cls(**arguments)` as a Ray actor whose process writes its output to the file `log`."""
    initialize: Any = vars(cls)["__init__"]

    def start(self: Actor, *, log: str, **arguments: object) -> None:
        Path(log).parent.mkdir(exist_ok=True)  # a copied run directory may come without its logs
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
        with failures_told():
            initialize(self, **arguments)

    logged = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update({"__init__": start}))
    remote: Any = ray.remote(**{"num_cpus": 0, **options})
    handle: ActorHandle[Actor] = remote(logged).remote(log=log, **arguments)
    return handle
