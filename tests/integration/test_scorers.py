"""A teacher in an actor of its own, in a real run whose scorer and store are killed."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from pmdflow.learner.scorers.protocol import Setup, TokenBatch
from pmdflow.learner.scorers.teacher import TEACHER, Teacher
from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask
from tests.support.runs import MODEL, Up, assert_exact, pmdflow, small_config

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(400)]


def test_a_killed_scorer_and_store_lose_nothing_and_every_token_is_taught(tmp_path: Path) -> None:
    config = small_config(tmp_path, run__iterations=4, learner__checkpoint_every=1, scheduler__max_staleness=None)
    config["learner"]["algorithm"] = "opd"
    use = "pmdflow.learner.scorers.teacher:Teacher"
    config["learner"]["scorers"] = {"teacher": {"use": use, "model": str(MODEL), "timeout_s": 5.0}}
    up = Up(tmp_path, config)
    for iteration, actor in enumerate(["ScorerActor", "StoreActor"], 1):
        up.wait_for(lambda iteration=iteration: up.reached(iteration), f"iteration {iteration}, before {actor} dies")
        up.actor(actor).send_signal(signal.SIGKILL)
    assert up.wait() == 0, up.output
    died = [event["message"] for event in up.events() if event["kind"] == "actor_died"]
    assert any("scorer-teacher-0" in message for message in died), died
    assert_exact(up)
    assert up.iterations()[0]["learner/credit_teacher_kl"] == pytest.approx(0.0, abs=1e-4), "it teaches itself at first"

    device = torch.device("cpu")
    setup = Setup(
        model=str(MODEL), settings={}, student=str(MODEL), device=device, dtype="float32", tokens_per_batch=4096
    )
    teacher, batch = Teacher(setup), read_part(parts(up.run)[-1])
    generated = (batch.mask & Mask.GENERATED) != 0
    expected = teacher.score(
        TokenBatch(
            tokens=batch.tokens,
            cu_seqlens=batch.cu_seqlens,
            generated=generated,
            temperatures=batch.temperatures,
        )
    )[TEACHER]
    np.testing.assert_allclose(batch.extra[TEACHER][generated], expected, atol=1e-4)

    dry = pmdflow("up", str(up.file), "--dry-run")
    assert "scorer teacher" in dry.stdout and dry.returncode == 0, dry.stdout + dry.stderr
