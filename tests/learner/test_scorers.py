"""Token scorers: what they are given, what becomes of their columns, and what is kept of those that learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pmdflow.config.errors import ConfigError
from pmdflow.config.load import load
from pmdflow.learner.learner import Learner
from pmdflow.learner.scorers.make import make_scorer, score_trajectories
from pmdflow.learner.scorers.protocol import ColumnSpec, Setup, TokenBatch
from pmdflow.learner.scorers.teacher import Teacher
from pmdflow.learner.token_scores import token_scores
from pmdflow.store.annotations import Unannotated
from pmdflow.types import Mask, TrainBatch
from tests.support.learner import make_batch, make_config, write_teacher
from tests.support.paths import ROOT
from tests.support.ranks import Ranks

torch.set_num_threads(1)
TEACHER = "pmdflow.learner.scorers.teacher:Teacher"
COUNTER = "tests.support.scorer:Counter"
READS = "tests.support.scorer:READS"


@pytest.fixture(scope="module")
def teacher(model_path, tmp_path_factory) -> str:
    """The student with other weights in its last layer."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), model_path, by=0.5)


def setup(model_path: str, model: str | None = None, **settings) -> Setup:
    device = torch.device("cpu")
    return Setup(
        model=model, settings=settings, student=model_path, device=device, dtype="float32", tokens_per_batch=50
    )


def as_tokens(batch: TrainBatch) -> TokenBatch:
    return TokenBatch(
        tokens=batch.tokens,
        cu_seqlens=batch.cu_seqlens,
        generated=(batch.mask & Mask.GENERATED) != 0,
        temperatures=batch.temperatures,
    )


def with_columns(batch: TrainBatch, scorer: Teacher) -> TrainBatch:
    """The batch as a store gives it whose trajectories the teacher has scored."""
    tokens, extra = as_tokens(batch), {}
    found = scorer.score(tokens)
    for spec in scorer.columns:
        extra[spec.name] = spec.filled(len(batch.tokens))
        extra[spec.name][tokens.generated] = found[spec.name]
    return replace(batch, extra=extra)


@pytest.mark.parametrize("name", ["opd", "vopd"])
def test_a_teacher_in_an_actor_teaches_as_one_at_the_claim(start, model_path, teacher, name: str) -> None:
    batch = make_batch()
    settings = {"algorithm": name, "steps_per_iteration": 1}
    at_claim = start(make_config(model_path, teacher=teacher, **settings)).train(batch)
    vocabulary = 128  # all tokens: then both baselines are the same KL
    scored = with_columns(batch, Teacher(setup(model_path, teacher, top=vocabulary if name == "vopd" else 0)))
    own = {"teacher": {"use": TEACHER, "model": teacher}}
    by_columns = start(make_config(model_path, scorers=own, **settings)).train(scored)
    np.testing.assert_allclose(
        by_columns.metrics["learner/credit_teacher_kl"], at_claim.metrics["learner/credit_teacher_kl"], rtol=1e-4
    )
    if name == "opd":
        np.testing.assert_allclose(by_columns.advantages, at_claim.advantages, rtol=1e-4, atol=1e-5)
    else:
        assert np.corrcoef(by_columns.advantages, at_claim.advantages)[0, 1] > 0.99


def test_a_column_that_nobody_writes_is_named(start, model_path, teacher) -> None:
    own = {"teacher": {"use": TEACHER, "model": teacher}}
    learner = start(make_config(model_path, algorithm="vopd", scorers=own))
    with pytest.raises(ValueError, match=r"'teacher_top', which no token .*there is teacher.*`top: 16`"):
        learner.train(with_columns(make_batch(), Teacher(setup(model_path, teacher))))
    learner = start(make_config(model_path, algorithm="opd", scorers=own))
    partly = with_columns(make_batch(), Teacher(setup(model_path, teacher)))
    partly.extra["teacher"][partly.cu_seqlens[1] - 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of \d+ tokens of a micro-batch have no value in the column 'teacher'"):
        learner.train(partly)


def test_a_privileged_context_is_seen_by_the_teacher_alone(model_path) -> None:
    batch = TokenBatch.of([[5, 6], [7]], [[8, 9], [10]])
    contexts = [[20, 21, 22], []]
    wider = batch.with_contexts(contexts)
    assert wider.tokens.tolist() == [20, 21, 22, 5, 6, 8, 9, 7, 10]
    assert wider.generated.tolist() == [False] * 5 + [True, True, False, True]
    plain = Teacher(setup(model_path))
    found, alone = plain.score(wider)["teacher"], plain.score(batch)["teacher"]
    assert found[2] == pytest.approx(alone[2], abs=1e-6) and abs(found[0] - alone[0]) > 1e-4
    told = Teacher(setup(model_path, context="tests.support.scorer:solution"))
    metadata = [{"solution": context} for context in contexts]
    np.testing.assert_array_equal(told.score(replace(batch, metadata=metadata))["teacher"], found)
    with pytest.raises(ValueError, match="1 contexts for 2 sequences"):
        batch.with_contexts([[1]])
    with pytest.raises(ValueError, match=r"settings\.tops is not known"):
        Teacher(setup(model_path, tops=3))


def test_each_branch_of_an_episode_is_scored_in_its_own_history(model_path) -> None:
    item = Unannotated(
        trajectory=0, attempt=0, metadata={}, prompt=np.array([9, 4], np.int32),
        tokens=np.array([5, 6, 7, 8, 10, 11], np.int32), observed=np.array([0, 0, 1, 0, 1, 0], np.uint8),
        temperatures=np.full(6, 0.5, np.float32), forks=((7, 3, 1), (8, 5, 2)),
    )  # fmt: skip
    scorer = Teacher(setup(model_path))
    empty = replace(item, tokens=item.tokens[:0], observed=item.observed[:0], forks=())
    before, both, after = score_trajectories(scorer, "teacher", [empty, item, empty])
    assert before["teacher"].shape == after["teacher"].shape == (0,)
    found = both["teacher"]
    for history, token in (([], 0), ([5], 1), ([5], 3), ([5, 8], 5)):
        own = TokenBatch.of([[9, 4, *history]], [[int(item.tokens[token])]])
        own = replace(own, temperatures=np.full(len(own.tokens), 0.5, np.float32))
        assert found[token] == pytest.approx(scorer.score(own)["teacher"][0], abs=1e-5)
    assert found[2] == found[4] == 0.0, "what the environment said is not scored"


def test_alternatives_have_the_gradient_of_their_log_probs() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((5, 6), (9, 6)))
    targets, temperatures = torch.tensor([1, 2, 3, 4, 8]), torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0])
    others = torch.tensor([[1, 0], [3, 3], [0, 3], [7, 4], [2, 1]])  # the target itself, and one twice
    scores = token_scores(hidden, weight, None, targets, temperatures, others)
    weights = torch.randn(5, 3).double()
    ours = torch.autograd.grad(
        (weights[:, :1] * scores.logprobs[:, None]).sum() + (weights[:, 1:] * scores.alternatives).sum()
        + scores.entropies.sum(), (hidden, weight),
    )  # fmt: skip
    logprobs = (hidden @ weight.T / temperatures[:, None]).log_softmax(1)
    chosen = logprobs.gather(1, torch.cat([targets[:, None], others], 1))
    entropy = -(logprobs.exp() * logprobs).sum()
    expected = torch.autograd.grad((weights * chosen).sum() + entropy, (hidden, weight))
    for own, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores.alternatives.detach(), chosen[:, 1:].detach(), rtol=1e-5)


def scored(start, model_path) -> Learner:
    return start(make_config(model_path, algorithm=READS, scorers={"counter": {"use": COUNTER, "when": "claim"}}))


def test_what_a_scorer_learned_is_in_the_checkpoint_and_moves_once_a_claim(start, model_path, tmp_path: Path) -> None:
    learner = scored(start, model_path)
    metrics = [learner.train(make_batch(seed=seed)).metrics for seed in range(2)]
    assert [one["learner/scorer_counter_claims"] for one in metrics] == [1.0, 2.0]
    learner.save(str(tmp_path / "saved"))
    learner.await_saved()
    last = learner.train(make_batch(seed=2)).metrics
    again = scored(start, model_path)
    again.load(str(tmp_path / "saved"))
    assert again.train(make_batch(seed=2)).metrics == last
    assert last["learner/scorer_counter_claims"] == 3.0
    fresh = scored(start, model_path)
    fresh.train(make_batch(seed=2))
    fresh.load_initial()
    assert fresh.train(make_batch(seed=2)).metrics["learner/scorer_counter_claims"] == 1.0
    assert "learner/scorer_NAME_KEY" in (ROOT / "pmdflow" / "metrics" / "METRICS.md").read_text()


def test_ranks_learn_one_scorer(start, model_path) -> None:
    settings = {"algorithm": READS, "scorers": {"counter": {"use": COUNTER, "when": "claim"}}}
    one = start(make_config(model_path, **settings)).train(make_batch())
    pool = Ranks(2)
    try:
        two = pool.train(make_config(model_path, ranks=2, **settings), [make_batch()])
        shared = pool.train(make_config(model_path, ranks=2, context_parallel=2, **settings), [make_batch()])
    finally:
        pool.kill()
    key = "learner/scorer_counter_sequences"
    assert two[0].metrics[0][key] == two[1].metrics[0][key] == one.metrics[key] == 18.0
    assert shared[0].metrics[0][key] == 18.0, "rows that ranks share count once"
    assert shared[0].metrics[0]["learner/scorer_counter_claims"] == 1.0


def test_what_is_set_wrong_is_refused_with_its_place(model_path, tmp_path: Path) -> None:
    def made(**scorer):
        config = make_config(model_path, scorers={"mine": {"use": COUNTER, **scorer}})
        return make_scorer(config, "mine", device=torch.device("cpu"))

    with pytest.raises(ValueError, match=r"learner\.scorers\.mine: .* learns, .*set `when: claim`"):
        made()
    with pytest.raises(ValueError, match=r"learner\.scorers\.mine: nowhere:x cannot be made"):
        made(use="nowhere:x")
    with pytest.raises(ValueError, match="has other tokens than"):
        Teacher(setup(model_path, str(ROOT / "configs" / "tiny-arithmetic")))
    with pytest.raises(ConfigError, match=r"learner\.scorers"):
        load(ROOT / "configs" / "quickstart.yaml", ["learner.scorers.Mine.use=a:b"])
    both = make_config(model_path, algorithm="opd", teacher=model_path, scorers={"teacher": {"use": TEACHER}})
    with pytest.raises(ValueError, match="in one of the two ways"):
        Learner(config=both, rank=0)
    assert ColumnSpec(name="x", dtype="int32", shape=(2,), fill=-1).filled(1).tolist() == [[-1, -1]]
