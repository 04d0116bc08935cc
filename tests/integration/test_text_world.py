"""Runs in a text world: what it says of turns reaches the learner once, what begins is closed, and it is learnt."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.environments.key_and_door import KeyAndDoor
from pmdflow.evaluate.command import EvalOptions, evaluate_checkpoint
from pmdflow.metrics.ledger import OUTSIDE_SUM
from pmdflow.rollout.turns import split_turns
from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask
from tests.support.runs import ROOT, Up, read_lines, small_config

CONFIGS = ROOT / "configs"
MODEL = str(CONFIGS / "tiny-key-and-door")
DEADLINE_S = 400.0

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Up, Path, int]:
    """A run with an environment that hangs at times, and an actor killed; with the folder of its marks."""
    directory = tmp_path_factory.mktemp("world")
    marks = directory / "marks"
    marks.mkdir()
    config = small_config(
        directory, model__path=MODEL, data__task=str(CONFIGS / "worlds.jsonl"), data__max_tokens=160,
        rollout__stop=["\n"], rollout__tokens_per_segment=40, scheduler__lookahead=0, scheduler__max_staleness=None,
        learner__algorithm="gigpo",
    )  # fmt: skip
    del config["data"]["args"]
    config["reward"]["functions"] = [{"function": "pmdflow.reward.said:score"}]
    config["environment"] = {"factory": "tests.support.environments:Troubled", "args": {"folder": str(marks)}}
    config["environment"] |= {"timeout_s": 2, "max_turns": 10}
    up = Up(directory, config)
    up.wait_for(lambda: len(up.iterations()) >= 1, "the first iteration", DEADLINE_S)
    actor = up.actor("ray::RolloutActor")
    actor.send_signal(signal.SIGKILL)
    assert up.wait(DEADLINE_S) == 0, up.output
    return up, marks, actor.pid


def test_each_note_is_there_once_and_is_the_reward(finished: tuple[Up, Path, int]) -> None:
    tokenizer: Any = load_tokenizer(MODEL)
    lines = (CONFIGS / "worlds.jsonl").read_text().splitlines()
    layouts = {row["prompt"]: row for row in map(json.loads, lines)}
    rewards = []
    for batch in map(read_part, parts(finished[0].run)):
        for row, (start, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)):
            low = start + batch.prompt_lengths[row]
            if low == end:
                continue  # its environment was late to begin: a busy machine
            world, prompt = KeyAndDoor(), tokenizer.decode(batch.tokens[start:low]).strip()
            first = world.reset(key="", prompt="", metadata=layouts[prompt])
            observed = (batch.mask[low:end] & Mask.GENERATED == 0).astype("u1")
            said, turns = split_turns(batch.tokens[low:end], observed)
            assert tokenizer.decode(said) == first.text
            notes, at = [(row, 0, {}, first.key)], len(said)
            for turn in turns:
                at += len(turn.action)
                if not turn.observed and at == end - low:
                    break
                if tokenizer.decode(turn.observed) != " error\n":
                    answer = world.step(key="", action=tokenizer.decode(turn.action))
                    earned = {} if answer.reward is None else {"reward": answer.reward}
                    notes.append((row, at, {**answer.metrics, **earned}, answer.key))
                at += len(turn.observed)
            assert [note for note in batch.turns if note[0] == row] == notes
            rewards.append(batch.rewards[row])
            assert rewards[-1] == sum(said.get("reward", 0.0) for _, _, said, _ in notes)
    assert 0 < sum(rewards) < len(rewards)


def test_turns_from_the_same_state_are_compared_and_the_ledger_is_exact(finished: tuple[Up, Path, int]) -> None:
    last = finished[0].iterations()[-1]
    assert last["learner/credit_shared_states_share"] > 0.5
    ledger = {key.removeprefix("ledger/"): value for key, value in last.items() if key.startswith("ledger/")}
    for key in OUTSIDE_SUM:
        del ledger[key]
    assert ledger.pop("generated") == sum(ledger.values())


def test_what_hangs_or_takes_too_many_turns_is_named(finished: tuple[Up, Path, int]) -> None:
    kinds = [(event["kind"], event["message"]) for event in finished[0].events()]
    assert any(kind == "environment_failed" and "no answer within 2 s" in said for kind, said in kinds)
    assert any(kind == "environment_ended" and "after 10 turns (environment.max_turns)" in said for kind, said in kinds)


def test_all_that_began_is_closed(finished: tuple[Up, Path, int]) -> None:
    _, marks, killed = finished
    begun, closed = ({path.stem for path in marks.glob(f"*.{end}")} for end in ("begun", "closed"))
    assert len(begun) > 20
    assert {name for name in begun - closed if not name.startswith(f"{killed}-")} == set()


def test_a_checkpoint_is_evaluated_in_the_world(finished: tuple[Up, Path, int], tmp_path: Path) -> None:
    up, marks, _ = finished
    options = EvalOptions(samples=2, prompts=6, out=tmp_path)
    assert evaluate_checkpoint(up.run, str(up.run / "config.yaml"), options) == 0
    rows = read_lines(tmp_path / "samples.jsonl")
    samples = [sample for row in rows for sample in row["samples"]]
    assert len(samples) == 12 and {sample["reward"] for sample in samples} <= {0.0, 1.0}
    assert all((sample["reward"] == 1.0) == sample["completion"].endswith("open\nopen\n") for sample in samples)
    begun, closed = ({path.stem for path in marks.glob(f"{os.getpid()}-*.{end}")} for end in ("begun", "closed"))
    assert begun == closed and begun


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_learnt(seed: int, tmp_path: Path) -> None:
    from pmdflow.config.load import load

    values = load(CONFIGS / "key_and_door.yaml", [f"run.seed={seed}", f"run.dir={tmp_path}"]).config.model_dump()
    up = Up(tmp_path, values)
    assert up.wait(1100) == 0, up.output
    rounds = [row["eval/reward_mean"] for row in read_lines(up.run / "metrics.jsonl") if row["kind"] == "eval"]
    assert rounds[-1] - rounds[0] >= 0.2, rounds
