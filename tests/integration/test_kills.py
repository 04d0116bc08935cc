"""Real kills of one actor after the other; everything at once is killed in `test_own_data`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.runs import Up, assert_exact, small_config

pytestmark = pytest.mark.timeout(400)


def test_killed_actors_are_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    actors = ["RolloutActor", "RewardActor", "LearnerActor", "StoreActor"]
    config = small_config(tmp_path, run__iterations=6, learner__checkpoint_every=1, scheduler__max_staleness=None)
    up = Up(tmp_path, config)
    for iteration, actor in enumerate(actors, 1):
        up.wait_for(lambda iteration=iteration: up.reached(iteration), f"iteration {iteration}, before {actor} dies")
        up.actor(actor).send_signal(signal.SIGKILL)
    assert up.wait() == 0, up.output
    assert up.reached(6)
    died = [event["message"] for event in up.events() if event["kind"] == "actor_died"]
    # Ray itself starts another store.
    assert all(any(name in message for message in died) for name in ("rollout-0", "reward", "learner")), died
    assert_exact(up)
