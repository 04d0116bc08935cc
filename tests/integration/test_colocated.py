"""A real run whose engine and learner have the same device in turn."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Up, read_lines, small_config

pytestmark = pytest.mark.timeout(600)
LEARNS = ("reference", "step", "publish", "checkpoint")
GENERATES = ("generate", "apply_weights")
LEEWAY_S = 0.05
"""Spans are cut by two clocks of one machine."""


def colocated(directory: Path, **overrides: Any) -> dict[str, Any]:
    config = small_config(directory, scheduler__lookahead=0, rollout__tokens_per_segment=60, **overrides)
    config["cluster"] = {"colocate": True}
    config["scheduler"] |= {"extra_groups": 2, "max_staleness": None}  # so that some are held while the learner trains
    return config


def overlaps(run: Path) -> list[tuple[str, str, float]]:
    """Where an engine worked while a learner rank had its memory on the device."""
    spans = read_lines(run / "spans.jsonl")
    learns = [span for span in spans if span["name"] in LEARNS and span["actor"].startswith("learner")]
    generates = [span for span in spans if span["name"] in GENERATES]
    assert learns and generates
    found = []
    for one, other in itertools.product(learns, generates):
        common_s = min(one["end"], other["end"]) - max(one["start"], other["start"])
        if common_s > LEEWAY_S:
            found.append((one["name"], other["name"], common_s))
    return found


def test_a_colocated_run_trains_in_turns(tmp_path: Path) -> None:
    up = Up(tmp_path, colocated(tmp_path, learner__checkpoint_every=3))
    assert up.wait() == 0, up.output
    assert [record["iteration"] for record in up.iterations()] == [1, 2, 3, 4]
    assert all(record["learner/trained_tokens"] > 0 for record in up.iterations())
    assert not [event for event in up.events() if event["kind"] == "actor_died"]
    assert overlaps(up.run) == []
    names = {(span["actor"].partition("/")[0], span["name"]) for span in read_lines(up.run / "spans.jsonl")}
    assert {("rollout-0", "offload"), ("rollout-0", "wait_device"), ("learner-0", "offload")} <= names


@pytest.mark.nightly
def test_two_pairs_take_turns_each(tmp_path: Path) -> None:
    up = Up(tmp_path, colocated(tmp_path, rollout__actors=2, learner__ranks=2))
    assert up.wait(300.0) == 0, up.output
    assert up.iterations()[-1]["iteration"] == 4 and overlaps(up.run) == []


@pytest.mark.nightly
@pytest.mark.parametrize("actor", ["RolloutActor", "LearnerActor"])
def test_whoever_is_killed_while_the_learner_trains_comes_back_in_its_turn(tmp_path: Path, actor: str) -> None:
    config = colocated(tmp_path, run__iterations=6, learner__steps_per_iteration=4)
    config["learner"]["checkpoint_every"] = 1
    up = Up(tmp_path, config)
    for iteration in (1, 3):
        up.wait_for(lambda iteration=iteration: up.reached(iteration), f"iteration {iteration}")
        wait_for_step(up)
        os.kill(up.actor(actor).pid, signal.SIGKILL)
    assert up.wait(300.0) == 0, up.output
    assert up.iterations()[-1]["iteration"] == 6
    assert len([event for event in up.events() if event["kind"] == "actor_died"]) >= 2
    assert overlaps(up.run) == []


def wait_for_step(up: Up, clock: Callable[[], float] = time.monotonic) -> None:
    """Until the learner has the device."""
    deadline = clock() + 60.0
    while clock() < deadline:
        spans = read_lines(up.run / "spans.jsonl")
        asleep = [span for span in spans if span["name"] == "wait_device" and span["actor"].startswith("rollout")]
        if asleep and time.time() - max(span["end"] for span in asleep) < 2.0:
            return
        time.sleep(0.02)
