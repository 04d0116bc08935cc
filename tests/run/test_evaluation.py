"""Rounds of evaluation: each of one version, which a few actors keep until it is over."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pmdflow.store.actor import StoreActor
from tests.support.without_learner import WithoutLearner, without_learner

pytestmark = pytest.mark.timeout(240)
MANY = "eval.prompts=700"
"""Prompts that one actor answers for seconds."""
NAMES = {"rollout-0", "rollout-1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WithoutLearner]:
    with without_learner(tmp_path_factory.mktemp("evaluation")) as world:
        yield world


def test_an_actor_keeps_the_version_of_a_round_while_the_other_trains_by_newer_ones(world: WithoutLearner) -> None:
    since, held_out, rounds = time.time(), world.held_out(MANY), len(world.rounds())
    world.admit(60)
    version = world.publish(held_out)
    world.until(lambda: bool(world.evaluating()), "an evaluator")
    (evaluator,) = world.evaluating()
    (other,) = NAMES - {evaluator}
    process = world.process(evaluator)
    process.suspend()  # what takes long
    world.publish()
    world.until(lambda: world.loop(other).process.uses == version + 1, "the newer version where nobody evaluates")
    assert world.evaluating() == [evaluator]
    process.resume()
    world.until(lambda: len(world.rounds()) > rounds, "the round")
    world.until(lambda: world.loop(evaluator).process.uses == version + 1, "the newer version after the round")
    record = world.rounds()[-1]
    assert (record["eval/round"], record["eval/version"], record["eval/prompts"]) == (version, version, 700)
    assert not world.events("actor_died")
    world.ticks(2)
    shown = [span for span in world.spans(since) if span["name"] == "wait_evaluation"]
    assert {span["actor"].split("/")[0] for span in shown} == {evaluator}
    assert {span["attrs"].get("version", version) for span in shown} == {version}


def test_what_is_unfinished_when_the_time_is_over_is_named_and_begins_again_in_the_next_round(
    world: WithoutLearner,
) -> None:
    rounds = len(world.rounds())
    version = world.publish(world.held_out(MANY, "eval.hold_s=0.02"))
    world.until(lambda: bool(world.events("evaluation_late")), "the end of the time")
    (said,) = world.events("evaluation_late")
    assert said.startswith(f"evaluation of iteration {version}: ") and "within eval.hold_s (0.02 s)" in said
    assert "they start again in the next round: " in said and "composite" in said
    assert len(world.rounds()) == rounds, "what is finished is what is short: no result"

    version = world.publish(world.held_out(MANY))
    world.until(lambda: len(world.rounds()) > rounds, "the next round")
    record = world.rounds()[-1]
    assert (record["eval/version"], record["eval/prompts"]) == (version, 700)


def test_an_evaluator_that_dies_is_followed_by_whoever_has_the_version(world: WithoutLearner) -> None:
    rounds = len(world.rounds())
    version = world.publish(world.held_out(MANY))
    world.until(lambda: bool(world.evaluating()), "an evaluator")
    world.process(world.evaluating()[0]).kill()
    world.until(lambda: len(world.rounds()) > rounds, "the round")
    assert world.rounds()[-1]["eval/version"] == version
    assert world.events("evaluation_again") == []
    world.until(lambda: all(loop.process.answered for loop in world.supervisor.loops), "its successor")


def test_a_round_whose_version_is_lost_begins_again_by_the_newest(world: WithoutLearner) -> None:
    rounds, held_out = len(world.rounds()), world.held_out(MANY)
    world.publish(held_out)
    world.until(lambda: bool(world.evaluating()), "an evaluator")
    (evaluator,) = world.evaluating()
    (other,) = NAMES - {evaluator}
    process = world.process(evaluator)
    process.suspend()
    newest = world.publish()
    held_out.published(newest, newest)
    world.until(lambda: world.loop(other).process.uses == newest, "the newer version")
    process.kill()
    world.until(lambda: len(world.rounds()) > rounds, "the round that began again")
    record = world.rounds()[-1]
    assert (record["eval/round"], record["eval/version"]) == (newest, newest)
    assert f"again, as that of iteration {newest} by version {newest}" in world.events("evaluation_again")[0]
    world.until(lambda: all(loop.process.answered for loop in world.supervisor.loops), "its successor")


def test_a_resumed_run_repeats_a_round_that_was_not_finished_and_no_other(world: WithoutLearner) -> None:
    rounds = len(world.rounds())
    version = world.publish(world.held_out("eval.prompts=8"))  # nobody has begun when the process ends
    again = world.held_out("eval.prompts=8")
    again.start(version, version)
    world.until(lambda: len(world.rounds()) > rounds, "the round that is repeated")
    assert [world.rounds()[-1][f"eval/{key}"] for key in ("round", "version", "prompts")] == [version, version, 8]
    world.held_out("eval.prompts=8").start(version, version)
    world.ticks(4)
    assert len(world.rounds()) == rounds + 1
    again = world.held_out("eval.prompts=8", "eval.every=2")
    again.start(version + version % 2 + 1, version)  # of weights that are gone: those at hand are evaluated instead
    world.ticks(3)
    assert len(world.rounds()) == rounds + 1 + (version % 2), "a round that is recorded counts"


def test_where_rollout_alternates_with_training_all_evaluate_while_an_iteration_is_trained(
    world: WithoutLearner,
) -> None:
    rounds, held_out = len(world.rounds()), world.held_out("eval.prompts=64", "scheduler.lookahead=0")
    version = world.publish(held_out)
    world.ticks(3)
    assert world.evaluating() == [] and len(world.rounds()) == rounds
    since = time.time()
    held_out.claimed()
    world.until(lambda: len(world.rounds()) > rounds, "the round")
    assert world.rounds()[-1]["eval/version"] == version
    world.until(lambda: not world.evaluating(), "the end of the round")
    world.ticks(2)
    assert {s["actor"].split("/")[0] for s in world.spans(since) if s["name"] == "wait_evaluation"} == NAMES


def test_with_one_actor_a_round_is_a_pause_of_rollout(world: WithoutLearner) -> None:
    (world.run / "requests").mkdir(exist_ok=True)
    (world.run / "requests" / "scale.json").write_text('{"rollout": 1}')
    world.until(lambda: len(world.supervisor.rollouts) == 1 and bool(world.events("actor_ended")), "one actor")
    world.admit(300)
    rounds, since = len(world.rounds()), time.time()
    world.publish(world.held_out(MANY))
    world.until(lambda: len(world.rounds()) > rounds and not world.evaluating(), "the round")
    done = world.ask(StoreActor.ledger)["generated"]
    world.until(lambda: world.ask(StoreActor.ledger)["generated"] > done, "training again")
    world.ticks(2)
    lane = world.spans(since)
    pause = [span for span in lane if span["name"] == "wait_evaluation"]
    begin, end = min(span["start"] for span in pause), max(span["end"] for span in pause)
    between = [span for span in lane if span["start"] < end - 1e-3 and span["end"] > begin + 1e-3]
    assert {span["name"] for span in between} == {"wait_evaluation"}
    world.until(
        lambda: any(span["name"] == "generate" and span["start"] > end for span in world.spans(since)), "training"
    )
