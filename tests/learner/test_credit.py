"""Credit through the learner: the view that an algorithm gets of a claim, and the gradient that its answer makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from pmdflow.learner.advantage import pmd_mean
from pmdflow.learner.algorithms import ALGORITHMS, find_algorithm
from pmdflow.learner.conformance import CASES, Trial, check_algorithm
from pmdflow.learner.learner import Learner
from pmdflow.learner.objective import pmd_loss, pmd_token_loss
from pmdflow.learner.view import ClaimView
from pmdflow.types import Branches, Mask
from tests.support import algorithm as own
from tests.support.learner import (
    LOGPROB_SIZE,
    ROUNDINGS,
    assert_losses_alike,
    losses,
    make_batch,
    make_config,
    same_weights,
    step_losses,
)
from tests.support.numeric import assert_close, assert_trained_alike
from tests.support.ranks import Ranks
from tests.support.whole import Whole

torch.set_num_threads(1)
SET = "tests.support.algorithm:SET"
OWN = ("CONSTANT", "SEES", "COUNTS", "CENTERED", "COLUMNS")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*ALGORITHMS, *(f"tests.support.algorithm:{name}" for name in OWN)])
def test_every_algorithm_keeps_the_rules(name: str, case: str) -> None:
    CASES[case](Trial(name))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("LEAKS", "changes by .* with the groups beside it: declare Algorithm"),
        ("SECRET", "view.reference and does not say so"),
        ("INFINITE", r"credit.values\[0\] is inf"),
        ("SHAPE", r"credit.values has shape \(1,\)"),
        ("CHANGES", "the given state was changed"),
    ],
)
def test_what_an_algorithm_breaks_is_said(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_algorithm(f"tests.support.algorithm:{name}")


def test_an_algorithm_that_is_not_there_is_said_once() -> None:
    with pytest.raises(ValueError, match="cannot be imported") as caught:
        check_algorithm("tests.support.nowhere:name")
    assert "breaks" not in str(caught.value)


def gradient(loss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logprobs = batch["logprobs"].clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(logprobs), logprobs)
    return found


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("packed", [True, False])
def test_constant_token_credit_has_the_gradient_of_pmd(aggregation: str, packed: bool) -> None:
    random = torch.Generator().manual_seed(0)
    lp = -torch.rand(4, 5, generator=random, dtype=torch.float64)
    anchor = lp - torch.randn(4, 5, generator=random, dtype=torch.float64) / 10
    generated = torch.ones(4, 5, dtype=torch.bool)
    trained = torch.rand(4, 5, generator=random) < 0.7
    trained[2] = False
    advantages, weights = torch.tensor([1.0, -0.5, 3.0, 0.25]).double(), torch.tensor([1.0, 2.0, 1.0, 0.5]).double()
    credit = advantages[:, None].expand(4, 5).clone()
    credit[~trained] = torch.nan
    settings = {"tau": 0.3, "aggregation": aggregation, "weights": weights, "norm_length": 7.0}
    cu = torch.arange(0, 21, 5) if packed else None
    shape = (lambda values: values.flatten()) if packed else (lambda values: values)
    lp = shape(lp)

    def both(loss, given):
        return gradient(
            lambda x: loss(
                x, shape(anchor), given, shape(trained), generated_mask=shape(generated), cu_seqlens=cu, **settings
            ),
            {"logprobs": lp},
        )

    torch.testing.assert_close(both(pmd_token_loss, shape(credit)), both(pmd_loss, advantages), rtol=1e-12, atol=1e-15)


def test_token_credit_by_its_definition() -> None:
    lp, anchor = torch.tensor([[-1.0, -2.0, -0.5]]).double(), torch.tensor([[-1.25, -1.5, -9.0]]).double()
    credit, trained = torch.tensor([[2.0, -1.0, 5.0]]).double(), torch.tensor([[True, True, False]])
    found = gradient(lambda x: pmd_token_loss(x, anchor, credit, trained, tau=0.5), {"logprobs": lp})
    u = (-1 + 1.25) + (-2 + 1.5)
    expected = [-(2 - 0.5 * u) / 2, -(-1 - 0.5 * u) / 2, 0.0]
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)


def test_training_on_constant_token_credit_is_training_on_its_sequences(start, model_path) -> None:
    weights = []
    for algorithm in ("pmd_mean", "tests.support.algorithm:CONSTANT"):
        learner = start(make_config(model_path, algorithm=algorithm))
        for seed in range(3):
            learner.train(make_batch(seed=seed))
        weights.append(learner.weights())
    assert_trained_alike(*weights, lr=1e-3, steps=6)


def seen(learner: Learner, batch) -> ClaimView:
    own.VIEWS.clear()
    learner.train(batch)
    (view,) = own.VIEWS
    return view


def test_a_view_has_what_the_claim_and_the_policy_say(start, model_path) -> None:
    batch, whole = make_batch(), Whole(model_path, make_batch())
    batch.rewards[batch.groups == 1] = 0.0
    config = make_config(model_path, algorithm="tests.support.algorithm:SEES", keep_groups_above=0.0)
    view = seen(start(config), batch)
    kept = [index for index, group in enumerate(batch.groups) if batch.rewards[batch.groups == group].mean() > 0]
    assert 0 < len(kept) < len(batch.groups)
    np.testing.assert_array_equal(view.rewards, batch.rewards[kept])
    np.testing.assert_array_equal(view.correct, batch.rewards[kept] == 1)
    assert view.prompt_ids == tuple(batch.prompt_ids[index] for index in kept)
    np.testing.assert_array_equal(view.lengths, [len(whole.trained[index]) for index in kept])
    for name, values, size in (
        ("reference", whole.logprobs, LOGPROB_SIZE),
        ("entropies", whole.entropies, LOGPROB_SIZE),
        ("behavior", whole.behavior, 1.0),
        ("versions", whole.versions, 1.0),
        ("trained", whole.trained, 1.0),
    ):
        expected = torch.cat([values[index] for index in kept]).detach().double().numpy()
        assert_close(getattr(view, name).astype(float), expected, roundings=ROUNDINGS, size=size, name=name)
    parts = [slice(*batch.cu_seqlens[index : index + 2]) for index in kept]
    masks = [(batch.mask[part] & Mask.GENERATED).astype(int) for part in parts]
    chosen = [batch.tokens[part][flags != 0] for part, flags in zip(parts, masks, strict=True)]
    np.testing.assert_array_equal(view.tokens, np.concatenate(chosen))
    turns = [np.cumsum(np.diff(flags, prepend=0) < 0)[flags != 0] for flags in masks]
    np.testing.assert_array_equal(view.turns, np.concatenate(turns))
    assert view.turns.max() == 1


def test_entropy_flow_is_the_derivative_of_the_entropy(start, model_path) -> None:
    batch = make_batch(groups=1)
    view = seen(start(make_config(model_path, algorithm="tests.support.algorithm:SEES")), batch)
    model, found = Whole(model_path, batch).model, []
    for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        ids = torch.from_numpy(batch.tokens[first:last].astype(np.int64))
        temperatures = torch.from_numpy(batch.temperatures[first + 1 : last, None]).double()
        logits = model(ids[None]).logits[0, :-1].detach() / temperatures
        for z, token, flags in zip(logits, ids[1:], batch.mask[first + 1 : last], strict=True):
            if flags & Mask.GENERATED:
                step = torch.nn.functional.one_hot(token, len(z)).double() - z.softmax(0)

                def entropy(size: float, z=z, step=step) -> float:
                    p = (z + size * step).softmax(0)
                    return float(-(p * p.log()).sum())

                found.append((entropy(1e-5) - entropy(-1e-5)) / 2e-5)
    np.testing.assert_allclose(view.entropy_flow, found, rtol=1e-3, atol=1e-5)


def test_branches_are_one_episode_of_a_view(start, model_path) -> None:
    batch = make_batch()
    parents = np.where(np.arange(len(batch.groups)) % 3 == 1, batch.trajectories - 1, -1)
    episodes = np.where(parents < 0, batch.trajectories, parents)
    branches = Branches(episodes=episodes, parents=parents, fork_offsets=np.zeros(len(parents), np.int32))
    batch = replace(batch, branches=branches, rewards=batch.rewards[episodes])
    view = seen(start(make_config(model_path, algorithm="tests.support.algorithm:SEES")), batch)
    assert view.num_episodes == 12
    generated = batch.count(Mask.GENERATED)
    np.testing.assert_array_equal(view.lengths, [n for a, b, c in generated.reshape(-1, 3) for n in (a + b, c)])
    first = view.turns[: view.lengths[0]]
    assert (np.diff(first) >= 0).all() and first[0] == 0 and first[-1] >= 1, "the second branch's turns come after"


def test_token_weights_scale_the_gradient_and_not_the_loss(start, model_path) -> None:
    found = {}
    for name in ("PLAIN", "DOUBLED"):
        config = make_config(model_path, algorithm=f"tests.support.algorithm:{name}", steps_per_iteration=1)
        found[name] = start(config).train(make_batch()).metrics
    assert found["DOUBLED"]["learner/loss"] == pytest.approx(found["PLAIN"]["learner/loss"], rel=1e-6)
    assert found["DOUBLED"]["learner/grad_norm"] == pytest.approx(2 * found["PLAIN"]["learner/grad_norm"], rel=1e-5)


def test_a_state_moves_once_a_claim_and_is_in_the_checkpoint(start, model_path, tmp_path) -> None:
    config = make_config(model_path, algorithm="tests.support.algorithm:COUNTS")
    learner = start(config)
    first = learner.train(make_batch(seed=0))
    learner.save(str(tmp_path / "saved"))
    learner.await_saved()
    second = learner.train(make_batch(seed=1))
    assert [result.metrics["learner/credit_claims"] for result in (first, second)] == [1, 2]
    weights = learner.weights()

    killed = start(config)  # after the claim, before its checkpoint
    killed.load(str(tmp_path / "saved"))
    again = killed.train(make_batch(seed=1))
    assert again.metrics["learner/credit_claims"] == 2, "the claim is trained again and counts once"
    assert same_weights(killed.weights(), weights)
    killed.load_initial()
    assert killed.train(make_batch()).metrics["learner/credit_claims"] == 1


def test_a_checkpoint_without_a_state_begins_with_the_first(start, model_path, tmp_path) -> None:
    learner = start(make_config(model_path))
    learner.train(make_batch())
    learner.save(str(tmp_path / "saved"))
    learner.await_saved()
    learner = start(make_config(model_path, algorithm="tests.support.algorithm:COUNTS"))
    learner.load(str(tmp_path / "saved"))
    assert learner.train(make_batch()).metrics["learner/credit_claims"] == 1


def test_settings_of_an_algorithm_are_its_own(start, model_path) -> None:
    with pytest.raises(ValueError, match=r"learner.settings.size: pmd_mean has no such setting; it has none"):
        Learner(config=make_config(model_path, settings={"size": 1.0}), rank=0)
    with pytest.raises(ValueError, match=r"learner.settings.shift is 'a': give a value like the default, 0.25"):
        find_algorithm(SET).configured(make_config(model_path, algorithm=SET, settings={"shift": "a"}).learner)
    batch = make_batch()
    for shift in (0.25, 2.0):
        config = make_config(model_path, algorithm=SET, settings={"shift": shift})
        np.testing.assert_array_equal(start(config).train(batch).advantages, batch.rewards - shift)


@pytest.mark.parametrize("name", [*ALGORITHMS, "tests.support.algorithm:SEES", "tests.support.algorithm:COUNTS"])
@pytest.mark.parametrize("anchor", ["reference", "behavior"])
def test_a_claim_that_is_filtered_whole_trains_nothing(start, model_path, name: str, anchor: str) -> None:
    teacher = model_path if name in ("opd", "vopd") else None
    learner = start(make_config(model_path, algorithm=name, keep_groups_above=5.0, teacher=teacher, anchor=anchor))
    weights = learner.weights()
    result = learner.train(make_batch(groups=2))
    assert result.metrics["learner/skipped_steps"] == 2 and not result.advantages.any()
    assert same_weights(learner.weights(), weights)


def test_what_group_rewards_remember_is_in_the_checkpoint(start, model_path, tmp_path) -> None:
    config = make_config(model_path)
    group = [{"function": "tests.reward.test_group:seen"}]
    reward = config.reward.model_validate({**config.reward.model_dump(), "group": group})
    learner = start(config.model_copy(update={"reward": reward}))
    visits = [
        learner.train(make_batch(seed=seed)).metrics["reward/group_test_group.seen.visits_mean"] for seed in (0, 1)
    ]
    learner.save(str(tmp_path / "saved"))
    learner.await_saved()
    third = learner.train(make_batch(seed=2)).metrics
    killed = start(config.model_copy(update={"reward": reward}))
    killed.load(str(tmp_path / "saved"))
    assert visits == [0, 1] and third["reward/group_test_group.seen.visits_mean"] == 2
    assert killed.train(make_batch(seed=2)).metrics == third


def test_extra_columns_reach_the_credit(start, model_path) -> None:
    batch = make_batch()
    share = np.random.default_rng(0).random(len(batch.tokens))
    learner = start(make_config(model_path, algorithm="tests.support.algorithm:COLUMNS"))
    found = learner.train(replace(batch, extra={"share": share, "unread": share})).advantages
    generated = (batch.mask & Mask.GENERATED) != 0
    means = [share[a:b][generated[a:b]].mean() for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]
    np.testing.assert_allclose(found, pmd_mean(batch.rewards, batch.groups) * means, rtol=1e-12)
    with pytest.raises(ValueError, match=r"extra column 'share', which no token of the claim has \(there is none\)"):
        learner.train(replace(batch, extra={"unread": share}))


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.kill()


@pytest.mark.parametrize("name", ["SEES", "CENTERED", "COUNTS", "WIDE"])
def test_ranks_give_the_credit_of_one(start, pool, model_path, name: str) -> None:
    settings = {"algorithm": f"tests.support.algorithm:{name}", "veto": True}
    claims = [make_batch(seed=0), make_batch(seed=1, groups=1)]  # of the second, the group is split
    one = start(make_config(model_path, **settings))
    expected = [one.train(claim) for claim in claims]
    ranks = pool.train(make_config(model_path, ranks=2, **settings), claims)
    assert ranks[0].metrics == ranks[1].metrics
    assert_losses_alike(step_losses(ranks[0].metrics), losses(expected))
    for metrics, result in zip(ranks[0].metrics, expected, strict=True):
        for key in (key for key in result.metrics if key.startswith("learner/credit_")):
            assert metrics[key] == pytest.approx(result.metrics[key], rel=1e-4), key
