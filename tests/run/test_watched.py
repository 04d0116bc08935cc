"""While files are read or removed, and while the learner does not answer, dead rollout actors are replaced."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmdflow.errors import LearnerDied
from pmdflow.run import supervision
from tests.support.runs import Up, small_config
from tests.support.without_learner import WithoutLearner, without_learner

pytestmark = pytest.mark.timeout(300)
STOPPED_S = 20.0
MOST_BLOCKED_S = 2.0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[WithoutLearner]:
    with without_learner(tmp_path, "eval.prompts=0") as world:
        yield world


def test_an_actor_that_dies_is_replaced_while_a_file_takes_its_time(world: WithoutLearner) -> None:
    reads, writes = os.pipe()
    looks: list[float] = []

    def look() -> None:
        looks.append(time.monotonic())
        if len(looks) == 2:
            world.process("rollout-0").kill()
        if world.events("actor_restarted"):
            os.write(writes, b"done")

    world.supervisor.watchers.append(look)
    assert world.supervisor.aside(lambda: os.read(reads, 4), what="reading a file that is slow") == b"done"
    assert max(later - earlier for earlier, later in itertools.pairwise(looks)) < MOST_BLOCKED_S
    with pytest.raises(FileNotFoundError):
        world.supervisor.aside(lambda: os.stat(world.run / "nothing"), what="a file that is not there")


def test_whoever_recovers_finds_no_file_half_written(world: WithoutLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def died() -> None:
        raise LearnerDied("a rank died")

    def written() -> None:
        time.sleep(4 * supervision.ASIDE_TICK_S)
        done.append("whole")

    monkeypatch.setattr(world.supervisor, "tick", died)
    with pytest.raises(LearnerDied):
        world.supervisor.aside(written, what="writing")
    assert done == ["whole"]


def restarts(up: Up) -> list[float]:
    return [event["time"] for event in up.events() if event["kind"] == "actor_restarted"]


@pytest.mark.nightly
def test_a_learner_that_stands_still_at_its_checkpoint_keeps_nobody_from_being_replaced(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, run__iterations=12, learner__checkpoint_every=1, learner__ranks=2, scheduler__max_staleness=None
    )
    up = Up(tmp_path, config)
    up.wait_for(lambda: up.reached(2), "two iterations")
    rank = [process for process in up.processes() if "LearnerActor" in " ".join(process.cmdline())][-1]
    up.wait_for(lambda: any((up.run / "checkpoints").glob("*.tmp")), "a checkpoint that is being written")
    rank.suspend()
    try:
        killed = time.time()
        up.actor("RolloutActor").kill()
        up.wait_for(lambda: bool(restarts(up)), "its successor", STOPPED_S)
        replaced = restarts(up)[0]
        samples = [line["time"] for line in up.samples() if line["time"] > killed]
        up.wait_for(lambda: len([line for line in up.samples() if line["time"] > killed]) > len(samples) + 5, "samples")
    finally:
        rank.resume()
    assert replaced - killed < MOST_BLOCKED_S + 1.0
    times = [line["time"] for line in up.samples() if line["time"] > killed]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < MOST_BLOCKED_S + 1.0
    assert up.wait() == 0, up.output
    assert up.reached(12)
