"""How near does a real run come to the speed of no bubble at all? Ray, store, controller and scheduler are real.

    python bench/token_clock.py [--iterations 30] [--step-s 0.05] [--out bench/results/token_clock.json]

The setting of `heavy_tail.py` at 8 rollout actors of 16 slots: lognormal lengths (median 3,000, 99th percentile 32,000
tokens, half of the variance between prompts), claims of 16 groups of 8, lookahead 2 and tokens of at most 4 iterations
(and 3 and 8). Simulated are the engine, which gives each of its sequences a token (that stands for 64) at every tick of
a clock, and the learner, which sleeps half the time that generation takes without a bubble. The bound is a token for
every slot at every tick. Beside each mode is what `pmdflow simulate`'s world says of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pmdflow.config.schema import Config
from pmdflow.learner.checkpoint.manifest import CheckpointFile
from pmdflow.learner.result import TrainResult
from pmdflow.metrics.history import History
from pmdflow.metrics.ledger import ledger_of
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.metrics.report import ActorReport
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.rollout.actor import RolloutActor
from pmdflow.rollout.engine import Output, Request
from pmdflow.rollout.engines.simulated import SimulatedEngine
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.run.actors import LoopMaker, make_actor, start_archive, start_ray, start_store
from pmdflow.run.controller import Controller
from pmdflow.run.directory import RunDirectory
from pmdflow.run.inputs import open_prompts
from pmdflow.run.scheduler import SchedulerSettings
from pmdflow.run.simulation import EngineModel, LearnerModel, LognormalLengths, Simulation, SimulationSettings
from pmdflow.run.supervision import Loop, Supervisor
from pmdflow.run.telemetry import Telemetry
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import StoreHandle, call
from pmdflow.types import Claim
from pmdflow.weights.file import NamedTensors
from pmdflow.weights.object_store import ObjectStoreTransport
from pmdflow.weights.transport import WeightsHandle

ROOT = Path(__file__).resolve().parents[1]
UNIT = 64
NO_STATE = b"a sleeping learner has no state\n"
GROUPS, SIZE = 16, 8
MOST = 32_768 // UNIT
LENGTHS = LognormalLengths(median=3000 / UNIT, p99=32_000 / UNIT)
ACTORS, SLOTS = 8, 16
PROMPT = 12
SKIP = 5
MODES: dict[str, dict[str, Any]] = {
    "asynchronous": {"lookahead": 2, "max_staleness": 4},
    "asynchronous, lookahead 3": {"lookahead": 3, "max_staleness": 8},
    "synchronous": {"lookahead": 0, "max_staleness": 0},
    "Kimi k1.5, 4 segments": {"lookahead": 0, "max_staleness": None, "tokens_per_segment": MOST // 4},
}


class ClockedEngine(SimulatedEngine):
    """Gives its tokens at the ticks of a clock: what its caller does between two of them costs nothing, what takes
    longer than a tick is lost. A trajectory has the same length wherever it goes on."""

    def __init__(self, *, num_slots: int, step_s: float) -> None:
        super().__init__(num_slots=num_slots)
        self._step_s = step_s
        self._tick = 0.0

    def add(self, request: Request) -> None:
        super().add(request)
        group, member = divmod(request.id, SIZE)
        lengths = LENGTHS.group(np.random.default_rng(group), SIZE)
        length = max(min(lengths[member], MOST) - (MOST - request.remaining), 1)
        sequence = self._sequences[request.id]
        sequence.tokens = [1] * length
        sequence.logprobs = [-1.0] * length
        if length < request.remaining:
            sequence.tokens[-1] = self.EOS

    def step(self) -> list[Output]:
        now = time.monotonic()
        self._tick = max(self._tick + self._step_s, now)
        time.sleep(self._tick - now)
        return super().step()


class ClockedRollout(RolloutActor):
    def __init__(self, *, config: Config, index: int, store: StoreHandle, run_dir: str, step_s: float) -> None:
        super().__init__(config=config, index=index, store=store, run_dir=run_dir)
        self._engine = ClockedEngine(num_slots=SLOTS, step_s=step_s)
        self._holder = Holder(self._engine, LeaseTaker(config))


class SleepingLearner:
    """Has the methods of a `LearnerActor`; training is sleep, and weights are empty."""

    def __init__(self, *, token_s: float) -> None:
        self._token_s = token_s
        self._spans = SpanBuffer("learner-0")

    def load_initial(self) -> None:
        pass

    def train(self, claim: Claim, store: StoreHandle) -> TrainResult:
        with self._spans.span("step"):
            time.sleep(self._token_s * int(claim.cu_seqlens[-1]))
        return TrainResult(metrics={}, speed={}, left_out={}, advantages=np.zeros(len(claim.rewards)))

    def publish(self, version: int) -> WeightsHandle:
        return ObjectStoreTransport("token-clock").publish(version, NamedTensors.of({}))

    def save(self, directory: str) -> None:
        Path(directory).mkdir(parents=True)
        (Path(directory) / "nothing").write_bytes(NO_STATE)

    def await_saved(self) -> tuple[CheckpointFile, ...]:
        return (CheckpointFile(path="nothing", size=len(NO_STATE), crc32=zlib.crc32(NO_STATE)),)

    def drain(self) -> ActorReport:
        return ActorReport(spans=self._spans.drain())


def config_of(mode: str, *, directory: str, iterations: int) -> Config:
    settings = dict(MODES[mode])
    segment = settings.pop("tokens_per_segment", None)
    return Config.model_validate({
        "run": {"name": mode.replace(" ", "-").replace(",", ""), "dir": directory, "iterations": iterations},
        "model": {"path": str(ROOT / "configs" / "tiny-arithmetic"), "dtype": "float32"},
        "data": {"task": "reasoning_gym/chain_sum", "group_size": SIZE, "max_tokens": MOST},
        "eval": {"prompts": 0, "every": iterations},
        "reward": {"functions": [{"function": "pmdflow.reward.reasoning_gym:score"}]},
        "rollout": {"engine": "simulated", "actors": ACTORS, "slots": SLOTS, "tokens_per_segment": segment},
        "scheduler": {"groups_per_iteration": GROUPS, "tokens_per_iteration": GROUPS * SIZE * MOST * 3, **settings},
        "learner": {"ranks": 1, "checkpoint_every": iterations},
        "dashboard": {"port": None},
    })  # fmt: skip


def run(config: Config, *, step_s: float, token_s: float) -> Path:
    """One run to its end, made as `pmdflow up` makes it but for the engine and the learner."""
    with RunDirectory.prepare(config) as directory, LiveView(config=config, dashboard_url=None) as live:
        path = directory.path
        prompts = open_prompts(config, on_skip=print)
        start_ray(config)
        try:
            store = start_store(config, path)
            supervisor = Supervisor(store=store, telemetry=Telemetry(recorder=Recorder(path), live=live))
            for loop in loops(config, path, store, step_s=step_s):
                supervisor.start_loop(loop)
            controller = Controller(
                config=config, run_dir=path, supervisor=supervisor, prompts=prompts,
                start_learners=lambda: [
                    make_actor(SleepingLearner, log=str(path / "logs" / "learner-0.log"),
                               options={"max_concurrency": 3}, arguments={"token_s": token_s})
                ],
                start_archive=partial(start_archive, config, path, store, attrs=directory.archive_attrs(config)),
            )  # fmt: skip
            controller.run()
            ray.get([call(store, StoreActor.close)], timeout=60)
        finally:
            ray.shutdown()
    return path


def loops(config: Config, path: Path, store: StoreHandle, *, step_s: float) -> list[Loop]:
    def rollout(index: int, weights: WeightsHandle | None, worker: str) -> Any:
        actor = make_actor(
            ClockedRollout, log=str(path / "logs" / f"rollout-{index}.log"), options={"max_concurrency": 8},
            arguments={"config": config, "index": index, "store": store, "run_dir": str(path), "worker": worker,
                       "step_s": step_s},
        )  # fmt: skip
        return actor, call(actor, RolloutActor.run, weights)

    made = LoopMaker(config, path, store, [{}] * ACTORS).all()
    for index, loop in enumerate(loop for loop in made if loop.takes_weights):
        loop.start = partial(rollout, index)
    return made


def measured(path: Path) -> dict[str, float]:
    """Claimed tokens a second and masked share, after the first `SKIP` iterations."""
    history = History(path)
    history.update()
    records = [history.iterations[number] for number in sorted(history.iterations)]
    first, last = records[SKIP - 1], records[-1]

    def claimed(record: dict[str, Any]) -> tuple[int, int]:
        ledger = ledger_of(record)
        masked = sum(tokens for place, tokens in ledger.items() if place.startswith("masked_"))
        return ledger["trained"] + masked, masked

    (before, _), (after, masked) = claimed(first), claimed(last)
    rest = records[SKIP:]
    return {
        "tokens_per_s": (after - before) / (last["time"] - first["time"]),
        "iteration_s": (last["time"] - first["time"]) / len(rest),
        "masked_share": (masked - claimed(first)[1]) / (after - before),
        "rollout_busy": sum(record["rollout/busy_share"] for record in rest) / len(rest),
        "staleness_mean": sum(record["staleness/mean"] for record in rest) / len(rest),
    }


def simulated(config: Config, *, step_s: float, token_s: float) -> dict[str, float]:
    scheduler = SchedulerSettings.of(config)
    settings = SimulationSettings(
        scheduler=scheduler, max_staleness=config.scheduler.max_staleness, iterations=config.run.iterations,
        group_size=SIZE, max_tokens=MOST, lengths=LENGTHS, engine=EngineModel(slots=SLOTS, step_s=step_s),
        learner=LearnerModel(iteration_s=0.0, token_s=token_s), actors=ACTORS, prompt_tokens=PROMPT,
    )  # fmt: skip
    steady = [Simulation(replace(settings, seed=seed)).run().steady(skip=SKIP) for seed in range(5)]
    return {
        name: sum(getattr(one, name) for one in steady) / len(steady)
        for name in ("tokens_per_s", "iteration_s", "masked_share", "staleness_mean")
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--step-s", type=float, default=0.05)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args(arguments)
    bound = ACTORS * SLOTS / options.step_s
    token_s = 0.5 / bound
    found: dict[str, Any] = {"step_s": options.step_s, "bound_tokens_per_s": bound}
    with tempfile.TemporaryDirectory(prefix="token-clock-") as directory:
        for mode in options.modes:
            iterations = options.iterations if MODES[mode]["lookahead"] else math.ceil(options.iterations / 2)
            config = config_of(mode, directory=directory, iterations=iterations + SKIP)
            real = measured(run(config, step_s=options.step_s, token_s=token_s))
            world = simulated(config, step_s=options.step_s, token_s=token_s)
            found[mode] = {"real": real, "simulated": world}
            print(
                f"{mode:<24} {real['tokens_per_s']:8,.0f} tokens/s, {real['tokens_per_s'] / bound:6.1%} of the bound "
                f"(simulated {world['tokens_per_s'] / bound:.1%}); {real['iteration_s']:.2f} s/iteration, "
                f"masked {real['masked_share']:.2%}, age {real['staleness_mean']:.2f}, busy {real['rollout_busy']:.1%}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
