"""Training state saved beside training, loaded, and resumed after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmdflow.errors import PmdflowError
from tests.support.checkpoint_files import written
from tests.support.learner import losses, make_batch, make_config, same_weights
from tests.support.paths import ROOT, SUPPORT
from tests.support.resumed_learner import ITERATIONS, main, write_claims

torch.set_num_threads(1)
CHILD = SUPPORT / "resumed_learner.py"
CHILD_TIMEOUT_S = 200


def test_save_load_continue_is_bit_equal(start, model_path, tmp_path):
    config = make_config(model_path, warmup_steps=5)
    learner = start(config)
    learner.train(make_batch(seed=0))
    learner.save(str(tmp_path / "saved"))
    expected = [learner.train(make_batch(seed=seed)).metrics for seed in (1, 2)]
    weights = learner.weights()
    learner = start(config)
    learner.load(str(tmp_path / "saved"))
    assert [learner.train(make_batch(seed=seed)).metrics for seed in (1, 2)] == expected
    assert same_weights(learner.weights(), weights)


def test_a_checkpoint_before_the_first_step_is_bit_equal_too(start, model_path, tmp_path):
    learner = start(make_config(model_path))
    learner.save(str(tmp_path / "saved"))
    expected = learner.train(make_batch()).metrics
    learner.load_initial()
    assert learner.train(make_batch()).metrics == expected, "saving changed nothing"
    learner.load(str(tmp_path / "saved"))
    assert learner.train(make_batch()).metrics == expected


def test_a_save_holds_the_moment_it_was_asked_for(start, model_path, tmp_path):
    learner = start(make_config(model_path))
    learner.train(make_batch(seed=0))
    before = learner.weights()
    learner.save(str(tmp_path / "saved"))
    after = losses([learner.train(make_batch(seed=1))])  # while the files are written
    learner.await_saved()
    learner.load(str(tmp_path / "saved"))
    assert same_weights(learner.weights(), before)
    assert losses([learner.train(make_batch(seed=1))]) == after


def test_a_save_that_fails_says_so(start, model_path, tmp_path):
    learner = start(make_config(model_path))
    (tmp_path / "file").write_text("in the way")
    learner.save(str(tmp_path / "file" / "saved"))
    with pytest.raises(PmdflowError, match=r"rank 0: .*Not a directory"):
        learner.await_saved()
    learner.save(str(tmp_path / "saved"))
    assert list(learner.await_saved()) == written(tmp_path / "saved"), "summed while they were written"


def child(model: str, directory: Path, *, hold: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(CHILD), model, str(directory), str(hold)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.timeout(2 * CHILD_TIMEOUT_S)
def test_two_n_iterations_equal_n_then_sigkill_then_resume(model_path, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        write_claims(directory)
    main(model_path, whole, 0)
    torch.use_deterministic_algorithms(False)  # in this process, which others share

    hold = ITERATIONS // 2 + 1
    process = child(model_path, killed, hold=hold)
    assert [process.stdout.readline() for _ in range(2)] == ["resumed 0\n", "holding\n"]
    process.send_signal(signal.SIGKILL)
    assert process.wait(CHILD_TIMEOUT_S) == -signal.SIGKILL
    process = child(model_path, killed, hold=0)
    output, _ = process.communicate(timeout=CHILD_TIMEOUT_S)
    assert process.returncode == 0
    # Iteration `hold` was trained and the one before it saved, but neither committed: both are trained again.
    assert output == f"resumed {hold - 2}\n"
    outcomes = [torch.load(directory / "final.pt") for directory in (whole, killed)]
    assert len(outcomes[0]["losses"]) == ITERATIONS
    assert outcomes[0]["losses"] == outcomes[1]["losses"], "bit for bit"
    assert same_weights(outcomes[0]["weights"], outcomes[1]["weights"])
