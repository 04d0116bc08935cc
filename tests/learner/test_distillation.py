"""On-policy distillation: what the teacher says reaches the credit, and the student learns it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pmdflow.learner.credit import opd, vopd
from pmdflow.learner.learner import Learner
from pmdflow.learner.view import TOP
from pmdflow.types import Mask, TrainBatch
from tests.support import algorithm as own
from tests.support.learner import LOGPROB_SIZE, ROUNDINGS, losses, make_batch, make_config, write_teacher
from tests.support.numeric import assert_close
from tests.support.paths import ROOT
from tests.support.ranks import Ranks
from tests.support.whole import Whole

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(model_path, tmp_path_factory) -> str:
    """The student with other weights in its last layer."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), model_path, by=0.5)


def seen(start, model_path, teacher: str, batch: TrainBatch):
    own.VIEWS.clear()
    config = make_config(model_path, algorithm="tests.support.algorithm:TAUGHT", teacher=teacher)
    start(config).train(batch)
    return own.VIEWS[-1]


def generated(batch: TrainBatch, path: str) -> torch.Tensor:
    """Log-probs of all tokens where each was generated, in float64 [P, V]."""
    model, found = Whole(path, batch).model, []
    for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        ids = torch.from_numpy(batch.tokens[first:last].astype(np.int64))
        scaled = model(ids[None]).logits[0, :-1] / torch.from_numpy(batch.temperatures[first + 1 : last, None]).double()
        chosen = torch.from_numpy((batch.mask[first + 1 : last] & Mask.GENERATED) != 0)
        found.append(scaled.log_softmax(-1)[chosen])
    return torch.cat(found).detach()


def test_the_teacher_scores_the_students_tokens(start, model_path, teacher) -> None:
    batch = make_batch()
    view = seen(start, model_path, teacher, batch)
    student, other = (generated(batch, path) for path in (model_path, teacher))
    tokens = torch.from_numpy(view.tokens)[:, None]
    ids = student.topk(TOP, dim=1).indices
    for found, expected in (
        (view.reference, student.gather(1, tokens)[:, 0]),
        (view.teacher, other.gather(1, tokens)[:, 0]),
        (view.student_top, student.gather(1, ids)),
        (view.teacher_top, other.gather(1, ids)),
    ):
        assert_close(found, expected.numpy(), roundings=ROUNDINGS, size=10 * LOGPROB_SIZE)
    assert np.abs(view.teacher - view.reference).mean() > 0.01, "the teacher is another model"


@pytest.mark.parametrize("name", ["opd", "vopd"])
def test_credit_is_that_of_the_definition(start, model_path, teacher, name: str) -> None:
    batch = make_batch()
    view = seen(start, model_path, teacher, batch)
    expected = opd(view.teacher, view.reference)
    if name == "vopd":
        expected = vopd(view.student_top, view.teacher_top, view.reference, view.teacher)
    result = start(make_config(model_path, algorithm=name, teacher=teacher, steps_per_iteration=1)).train(batch)
    np.testing.assert_allclose(result.advantages, view.episode_means(expected), rtol=1e-4, atol=1e-6)
    kl = view.episode_means(view.reference - view.teacher).mean()
    assert result.metrics["learner/credit_teacher_kl"] == pytest.approx(kl, rel=1e-4)
    assert result.metrics["learner/teacher_tokens"] == batch.cu_seqlens[-1]
    assert "learner/teacher_tokens" in (ROOT / "pmdflow" / "metrics" / "METRICS.md").read_text()


def test_the_student_comes_nearer_to_its_teacher(start, model_path, teacher, tmp_path: Path) -> None:
    learner = start(make_config(model_path, algorithm="opd", teacher=teacher, lr=2e-3))

    def distance() -> float:
        """KL(student || teacher), exact, on texts that neither is trained on."""
        model = AutoModelForCausalLM.from_pretrained(model_path)
        model.load_state_dict(learner.weights(), strict=False)
        model.save_pretrained(tmp_path)
        student, other = (generated(make_batch(seed=99), path) for path in (str(tmp_path), teacher))
        return float((student.exp() * (student - other)).sum(1).mean())

    before = distance()
    for seed in range(8):
        learner.train(on_policy(learner, model_path, seed))
    assert distance() < 0.9 * before


def on_policy(learner: Learner, model_path: str, seed: int) -> TrainBatch:
    """A claim that the present student generated."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    model.load_state_dict(learner.weights(), strict=False)
    batch, random = make_batch(seed=seed, version=0, groups=8), torch.Generator().manual_seed(seed)
    batch.mask[batch.versions >= 0] = Mask.GENERATED | Mask.TRAINED
    for first, last, prompt in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.prompt_lengths, strict=False):
        with torch.no_grad():
            for at in range(first + prompt, last):
                ids = torch.from_numpy(batch.tokens[first:at].astype(np.int64))
                p = (model(ids[None]).logits[0, -1] / 0.8).softmax(0)
                batch.tokens[at] = int(torch.multinomial(p, 1, generator=random))
    return batch


def test_a_teacher_that_is_the_student_gives_no_credit(start, model_path) -> None:
    result = start(make_config(model_path, algorithm="opd", teacher=model_path, steps_per_iteration=1)).train(
        make_batch()
    )
    assert np.abs(result.advantages).max() == 0 and result.metrics["learner/grad_norm"] == 0


def test_ranks_are_taught_alike(start, model_path, teacher) -> None:
    settings = {"algorithm": "vopd", "teacher": teacher}
    one = start(make_config(model_path, **settings)).train(make_batch())
    pool = Ranks(2)
    try:
        two = pool.train(make_config(model_path, ranks=2, **settings), [make_batch()])
    finally:
        pool.kill()
    assert two[0].metrics == two[1].metrics
    assert two[0].metrics[0]["learner/teacher_tokens"] == one.metrics["learner/teacher_tokens"]
    assert_close(two[0].metrics[0]["learner/step_losses"], losses([one]), roundings=ROUNDINGS, size=10 * LOGPROB_SIZE)


def test_what_does_not_fit_is_refused(start, model_path, teacher, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"learner\.teacher is None while learner.algorithm is opd"):
        make_config(model_path, algorithm="opd")
    with pytest.raises(ValidationError, match=r"learner\.algorithm is pmd_mean: opd and vopd learn from a teacher"):
        make_config(model_path, teacher=teacher)
    with pytest.raises(ValueError, match="set a teacher if it needs"):
        Learner(config=make_config(model_path, algorithm="tests.support.algorithm:TAUGHT"), rank=0)
    small = Qwen3Config.from_pretrained(model_path)
    small.vocab_size = 64
    Qwen3ForCausalLM(small).save_pretrained(tmp_path / "other")
    learner = Learner(config=make_config(model_path, algorithm="opd", teacher=str(tmp_path / "other")), rank=0)
    try:
        with pytest.raises(ValueError, match="has 64 tokens, the policy 128"):
            learner.setup(learner.address())
    finally:
        learner.close()
