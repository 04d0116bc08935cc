"""A whole run through every part: loop, ledger, archive, replay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask
from tests.support.numeric import assert_close
from tests.support.runs import Up, assert_prompts_once, ledger_of, pmdflow, read_lines, small_config

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Up:
    directory = tmp_path_factory.mktemp("run")
    up = Up(directory, small_config(directory))
    assert up.wait() == 0, up.output
    return up


def test_every_iteration_is_trained_once_and_published(finished: Up) -> None:
    records = finished.iterations()
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert [record["version"] for record in records] == [1, 2, 3, 4]


def test_every_round_of_evaluation_is_of_one_version_and_a_pause_of_the_only_rollout_actor(finished: Up) -> None:
    rounds = [record for record in read_lines(finished.run / "metrics.jsonl") if record["kind"] == "eval"]
    assert [record["eval/version"] for record in rounds] == [record["eval/round"] for record in rounds]
    assert (rounds[0]["eval/round"], rounds[-1]["eval/round"]) == (0, 4)
    pauses = [span for span in read_lines(finished.run / "spans.jsonl") if span["name"] == "wait_evaluation"]
    assert {span["attrs"].get("version", 0) for span in pauses} == {record["eval/version"] for record in rounds}


def test_the_ledger_is_exact_in_every_iteration(finished: Up) -> None:
    for record in finished.iterations():
        ledger = ledger_of(record)
        generated = ledger.pop("generated")
        assert generated == sum(ledger.values())


def test_no_over_age_token_has_a_gradient(finished: Up) -> None:
    for path in parts(finished.run):
        batch = read_part(path)
        trained = (batch.mask & Mask.TRAINED) != 0
        assert (batch.version - batch.versions[trained]).max() <= 4


def test_trained_tokens_of_the_ledger_are_those_of_the_archive(finished: Up) -> None:
    archived = sum(int(((read_part(path).mask & Mask.TRAINED) != 0).sum()) for path in parts(finished.run))
    assert finished.iterations()[-1]["ledger/trained"] == archived


def test_plain_zarr_gives_the_mean_rewards_of_the_metrics(finished: Up) -> None:
    records = finished.iterations()
    for path, record in zip(parts(finished.run), records, strict=True):
        rewards = np.asarray(zarr.open_group(path, mode="r")["trajectory/reward"][:])
        assert rewards.mean() == pytest.approx(record["reward/mean"], abs=1e-12)


def test_prompts_are_admitted_in_order_without_a_gap(finished: Up) -> None:
    assert_prompts_once(finished.run)


def test_the_summary_says_what_happened(finished: Up) -> None:
    for words in ("held-out", "ledger", "staleness"):
        assert words in finished.output.lower()


def test_replay_verifies_bit_for_bit(finished: Up) -> None:
    done = pmdflow("replay", str(finished.run), "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 iterations have equal losses" in done.stdout


def test_verify_refuses_other_hardware_by_name(finished: Up) -> None:
    meta = finished.run / "meta.json"
    written = meta.read_text()
    try:
        changed = json.loads(written)
        changed["hardware"]["processor"] = "another one"
        meta.write_text(json.dumps(changed))
        done = pmdflow("replay", str(finished.run), "--verify")
    finally:
        meta.write_text(written)
    assert done.returncode == 1
    assert "processor 'another one'" in done.stderr


def test_replay_from_a_checkpoint_verifies(finished: Up) -> None:
    done = pmdflow("replay", str(finished.run), "--verify", "--from", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 iterations have equal losses" in done.stdout


def test_replay_with_another_tau_changes_the_losses(finished: Up) -> None:
    done = pmdflow("replay", str(finished.run), "--set", "learner.tau=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 4 iterations have equal losses" in done.stdout


def test_two_ranks_give_the_losses_of_one(finished: Up) -> None:
    from pmdflow.config.load import load_run
    from pmdflow.replay.claims import replay_claims

    config = load_run(finished.run, ["learner.ranks=2"]).config
    for result in replay_claims(finished.run, config, start=0):
        assert_close(result.losses, result.recorded, roundings=26 * 320, size=10.0)  # as in replay/test_recorded_run


def test_raising_the_iterations_continues_a_finished_run(finished: Up, tmp_path: Path) -> None:
    done = pmdflow("up", str(finished.file), "run.iterations=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished.iterations()[-1]["iteration"] == 5
    assert_prompts_once(finished.run)
