"""Real kills: an actor, everything, and Ctrl-C twice; once is a drain, as in `test_signals`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pmdflow.store.archive import parts
from tests.support.runs import Up, assert_exact, small_config

pytestmark = pytest.mark.timeout(400)


def test_killed_actors_are_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    actors = ["RolloutActor", "RewardActor", "LearnerActor", "StoreActor"]
    config = small_config(tmp_path, run__iterations=10, learner__checkpoint_every=1, scheduler__max_staleness=None)
    up = Up(tmp_path, config)
    for number, actor in enumerate(actors):
        iteration = 2 * (number + 1)
        up.wait_for(lambda iteration=iteration: up.reached(iteration), f"iteration {iteration}, before {actor} dies")
        up.actor(actor).send_signal(signal.SIGKILL)
    assert up.wait() == 0, up.output
    assert up.reached(10)
    died = [event["message"] for event in up.events() if event["kind"] == "actor_died"]
    # Ray itself starts another store.
    assert all(any(name in message for message in died) for name in ("rollout-0", "reward", "learner")), died
    assert_exact(up)


def test_after_everything_is_killed_up_continues_without_skipping_or_repeating(tmp_path: Path) -> None:
    config = small_config(tmp_path, run__iterations=6, scheduler__max_staleness=None)
    up = Up(tmp_path, config)
    up.wait_for(lambda: len(up.iterations()) >= 3, "the third iteration")
    up.kill_everything()
    again = Up(tmp_path, config)
    assert again.wait() == 0, again.output
    assert any(event["kind"] == "resume" for event in again.events())
    assert [int(path.name[5:11]) for path in parts(again.run)] == [1, 2, 3, 4, 5, 6]
    assert_exact(again)


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    up = Up(tmp_path, small_config(tmp_path, run__iterations=50))
    up.wait_for(lambda: len(up.iterations()) >= 1, "the first iteration")
    os.kill(up.process.pid, signal.SIGINT)
    up.wait_for(lambda: "draining" in up.output, "the first answer")
    os.kill(up.process.pid, signal.SIGINT)
    assert up.wait(30) in (0, 130), up.output
