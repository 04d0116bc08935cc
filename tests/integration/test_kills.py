"""Real kills of one actor after the other; everything at once is killed in `test_own_data`."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from pmdflow.run.stored import stored
from pmdflow.store import TrajectoryStore
from pmdflow.store.archive import parts, read_part
from tests.support.runs import Up, assert_exact, ledger_of, small_config

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


@pytest.mark.nightly
def test_what_is_trained_again_makes_no_rollout_too_old(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, run__iterations=14, learner__checkpoint_every=5, scheduler__max_staleness=4, scheduler__lookahead=2
    )
    up = Up(tmp_path, config)
    for iteration in (4, 9):
        up.wait_for(lambda iteration=iteration: up.reached(iteration), f"iteration {iteration}")
        up.actor("LearnerActor").send_signal(signal.SIGKILL)
    assert up.wait() == 0, up.output
    assert up.reached(14)
    assert_exact(up)
    assert max(record["staleness/max"] for record in up.iterations()) <= 4


@pytest.mark.nightly
def test_a_store_that_is_older_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    up = Up(tmp_path, small_config(tmp_path, run__iterations=2))
    assert up.wait() == 0, up.output
    shutil.rmtree(up.run / "store")
    again = Up(tmp_path, small_config(tmp_path, run__iterations=3))
    assert again.wait() == 1, again.output
    assert "the store is older than the checkpoint" in again.output
    assert "iteration-000002.json" in again.output


@pytest.mark.nightly
def test_a_group_of_a_live_run_is_discarded_and_the_run_goes_on(tmp_path: Path) -> None:
    up = Up(tmp_path, small_config(tmp_path, run__iterations=8, scheduler__max_staleness=None))
    up.wait_for(lambda: up.reached(1), "the first iteration")
    groups = TrajectoryStore.read(up.run / "store").groups()
    group = max(row["group"] for row in groups if row["kind"] == "train")
    assert (
        stored(up.run, "discard", group=group, reason="its answer is wrong") == 0
    )  # a command takes too long to start
    impossible = f"discard-{2**70}.json"
    (up.run / "requests" / impossible).write_text(f'{{"group": {2**70}, "reason": "bad \\udcff"}}')
    up.wait_for(lambda: sum(event["kind"] == "discard" for event in up.events()) == 2, "both answers")
    assert up.wait() == 0, up.output
    said = {event["message"] for event in up.events() if event["kind"] == "discard"}
    assert f"group {group} is discarded: its answer is wrong" in said
    assert any(message.startswith(f"request '{impossible}' is refused: {2**70} is no group") for message in said)
    assert not list((up.run / "requests").iterdir())
    assert group not in {int(number) for path in parts(up.run) for number in read_part(path).groups}
    ledger = ledger_of(up.iterations()[-1])
    assert ledger.pop("generated") == sum(ledger.values())
