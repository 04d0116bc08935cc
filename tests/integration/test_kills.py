"""Real kills: an actor, everything, and Ctrl-C."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pmdflow.store import TrajectoryStore
from pmdflow.store.archive import parts, read_part
from tests.integration.test_run import assert_prompts_once, ledger_of
from tests.support.runs import Up, small_config

pytestmark = pytest.mark.timeout(400)


def assert_exact(up: Up) -> None:
    """The ledger's sums match, and every admitted prompt is either archived once or still in the store."""
    ledger = ledger_of(up.iterations()[-1])
    assert ledger.pop("generated") == sum(ledger.values())
    assert_prompts_once(up.run)
    store = TrajectoryStore(up.run / "store", groups_per_iteration=4, lookahead=1, max_staleness=None)
    waiting = {f"chain_sum-{group['cursor']}" for group in store.groups() if group["iteration"] is None}
    cursors = store.counts().next_cursor
    evicted = sum(count for place, count in store.ledger().items() if place.startswith("evicted_"))
    store.close()
    trained = {name for path in parts(up.run) for name in read_part(path).prompt_ids}
    assert not waiting & trained
    assert evicted == 0  # the runs are unbounded in staleness
    assert waiting | trained == {f"chain_sum-{cursor}" for cursor in range(cursors)}


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


def test_ctrl_c_drains_and_says_how_to_resume(tmp_path: Path) -> None:
    up = Up(tmp_path, small_config(tmp_path, run__iterations=50))
    up.wait_for(lambda: len(up.iterations()) >= 1, "the first iteration")
    os.kill(up.process.pid, signal.SIGINT)
    assert up.wait(60) == 0, up.output
    assert f"pmdflow up {up.file}" in up.output
    assert (up.run / "checkpoints" / f"iteration-{up.iterations()[-1]['iteration']:06d}.json").exists()


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    up = Up(tmp_path, small_config(tmp_path, run__iterations=50))
    up.wait_for(lambda: len(up.iterations()) >= 1, "the first iteration")
    os.kill(up.process.pid, signal.SIGINT)
    up.wait_for(lambda: "draining" in up.output, "the first answer")
    os.kill(up.process.pid, signal.SIGINT)
    assert up.wait(30) in (0, 130), up.output
