"""A live run gets more rollout actors, and fewer, without losing a durable token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmdflow.errors import PmdflowError
from pmdflow.run.directory import RunDirectory
from pmdflow.run.scaling import ask, remembered
from pmdflow.store.actor import StoreActor
from tests.support.without_learner import WithoutLearner, configured, without_learner

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[WithoutLearner]:
    with without_learner(tmp_path, "eval.prompts=0", "learner.ranks=4") as world:  # room in Ray for other actors
        yield world


def scaled(world: WithoutLearner, number: int) -> None:
    with RunDirectory.prepare(world.config):
        assert "asked the run to have" in ask(world.run, f"rollout={number}")
    before = len(world.events("scale"))
    world.until(lambda: len(world.events("scale")) > before, "the answer")


def test_actors_come_and_go_and_no_durable_token_is_lost(world: WithoutLearner) -> None:
    world.admit(100)
    world.publish()
    scaled(world, 3)
    world.until(lambda: all(loop.process.answered for loop in world.supervisor.loops), "all of them")
    world.publish()
    world.until(lambda: [loop.process.uses for loop in world.supervisor.rollouts] == [2, 2, 2], "version 2")
    assert world.events("scale") == ["rollout actors: 2 before, 3 from now on"]

    world.admit(60)
    scaled(world, 1)
    assert [loop.name for loop in world.supervisor.rollouts] == ["rollout-0"]
    world.until(lambda: len(world.events("actor_ended")) == 2, "the end of two")
    assert [loop.name for loop in world.supervisor.loops if loop.takes_weights] == ["rollout-0"]
    assert world.events("actor_died") == []
    scaled(world, 2)  # under the same name, but not that of the worker, which is fenced
    world.until(lambda: world.loop("rollout-1").process.answered, "another one")
    assert world.loop("rollout-1").process.worker == "rollout-1/2"
    world.until(lambda: world.ask(StoreActor.counts).groups_ready == 160, "every group, by whoever is left")
    ledger = world.ask(StoreActor.ledger)
    assert ledger["ready"] == ledger["generated"] > 0, "every durable token is in a group that is trained"
    assert json.loads((world.run / "scale.json").read_text()) == {"rollout": 2, "configured": 2}


def test_agent_programs_are_shared_out_anew(tmp_path: Path) -> None:
    agents = ["agents.command=[sleep, '600']", "agents.concurrency=4"]
    with without_learner(tmp_path, "eval.prompts=0", *agents) as world:
        world.admit(2)

        def programs() -> int:
            return int(world.ask(StoreActor.counts).trajectories_leased)

        world.until(lambda: programs() == 4, "two of each actor")
        scaled(world, 1)
        world.until(lambda: len(world.events("actor_ended")) == 1, "the end of one")
        world.until(lambda: programs() == 4, "all of the one that is left")


def test_a_resume_has_as_many_unless_the_setting_was_changed(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    assert remembered(run, config) is config
    (run / "scale.json").write_text('{"rollout": 5, "configured": 2}')
    assert remembered(run, config).rollout.num_actors == 5
    assert remembered(run, configured(tmp_path, "rollout.actors=3")).rollout.num_actors == 3
    (run / "scale.json").write_text("torn")
    assert remembered(run, config) is config


def test_a_request_that_cannot_be_is_refused_with_its_remedy(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with RunDirectory.prepare(config) as directory:
        for wanted in ("rollout=0", "rollout=-1", "learner=2", "rollout=9999999", "rollout"):
            with pytest.raises(PmdflowError, match="nothing to scale to") as refused:
                ask(directory.path, wanted)
            assert "rollout=N" in str(refused.value.hint)
    with pytest.raises(PmdflowError, match="is not going on") as refused:
        ask(directory.path, "rollout=2")
    assert "rollout.actors=2" in str(refused.value.hint)
