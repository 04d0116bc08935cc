"""The learner on a tiny random Qwen3: splits, ranks, determinism, checkpoints, and the manifest that commits them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pmdflow.config.schema import Config
from pmdflow.errors import PmdflowError
from pmdflow.learner import token_scores
from pmdflow.learner.advantage import pmd_mean
from pmdflow.learner.algorithms import ALGORITHMS, find_algorithm
from pmdflow.learner.attention import ATTENTION
from pmdflow.learner.batch import BUCKET, pack, plan_iteration
from pmdflow.learner.checkpoint.manifest import (
    Manifest,
    commit_checkpoint,
    manifest_at,
    newest_manifest,
    oldest_manifest,
    prune,
)
from pmdflow.learner.learner import Learner
from pmdflow.learner.policy import Layout, Policy
from pmdflow.reward.length import length_reward
from pmdflow.types import Mask, TrainBatch

torch.set_num_threads(1)
VOCAB = 128


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def make_config(model_path: str, *, dtype: str = "float32", length_weight: float = 0.0, **learner) -> Config:
    defaults = {
        "tau": 0.5, "aggregation": "seq-mean-token-mean", "steps_per_iteration": 2, "tokens_per_microbatch": 64,
        "lr": 1e-3, "max_grad_norm": 10.0,
    }  # fmt: skip
    return Config.model_validate(
        {
            "run": {"name": "test", "iterations": 4},
            "model": {"path": model_path, "dtype": dtype},
            "data": {"task": "reasoning_gym/chain_sum", "group_size": 3, "max_tokens": 16},
            "reward": {"functions": [{"function": "a:b"}], "length_weight": length_weight},
            "scheduler": {"groups_per_iteration": 6, "tokens_per_iteration": 1000},
            "learner": {**defaults, **learner},
        }
    )


def make_batch(*, seed: int = 0, version: int = 2, groups: int = 6, trained: bool = True) -> TrainBatch:
    """Groups of 3, tokens of versions 0 to `version`; version 0 is over-age, and trajectory 4 wholly untrained."""
    random = np.random.default_rng(seed)
    num = groups * 3
    columns = {name: [] for name in ("tokens", "logprobs", "versions", "temperatures", "mask")}
    prompts, ends = random.integers(2, 6, num), [0]
    for index in range(num):
        length = int(random.integers(1, 15))
        versions = np.sort(random.integers(0, version + 1, length))
        flags = np.where(versions > 0, Mask.GENERATED | Mask.TRAINED, Mask.GENERATED | Mask.OVER_AGE)
        if index == 4 or not trained:
            flags[:] = Mask.GENERATED | Mask.OVER_AGE
        if length > 6:
            flags[3] = 0  # an observed token
        pad = [0] * prompts[index]
        columns["tokens"] += random.integers(1, VOCAB, prompts[index] + length).tolist()
        columns["logprobs"] += [*pad, *(-4 + random.standard_normal(length))]
        columns["versions"] += [-1 for _ in pad] + versions.tolist()
        columns["temperatures"] += [1.0 for _ in pad] + [0.8] * length
        columns["mask"] += [*pad, *flags.tolist()]
        ends.append(len(columns["tokens"]))
    return TrainBatch(
        iteration=1,
        version=version,
        tokens=np.array(columns["tokens"], np.int32),
        logprobs=np.array(columns["logprobs"], np.float32),
        versions=np.array(columns["versions"], np.int32),
        temperatures=np.array(columns["temperatures"], np.float32),
        mask=np.array(columns["mask"], np.uint8),
        cu_seqlens=np.array(ends, np.int64),
        prompt_lengths=prompts.astype(np.int32),
        groups=np.repeat(np.arange(groups), 3),
        trajectories=np.arange(num),
        rewards=random.integers(0, 2, num).astype(np.float64),
        components={},
        stops=np.ones(num, np.uint8),
        prompt_ids=tuple(f"p{index // 3}" for index in range(num)),
    )


@pytest.fixture
def start(request):
    """Make a learner that leaves its process group when the test ends; only one lives at a time."""
    open_learners: list[Learner] = []

    def close_all() -> None:
        for learner in open_learners:
            learner.close()
        open_learners.clear()

    def make(config: Config) -> Learner:
        close_all()
        learner = Learner(config=config, rank=0)
        learner.setup(learner.address())
        open_learners.append(learner)
        return learner

    yield make
    close_all()
    torch.use_deterministic_algorithms(False)


def same_weights(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# ---- steps, ranks, micro-batches


@given(
    seed=st.integers(0, 50),
    steps=st.integers(1, 6),
    ranks=st.integers(1, 4),
    limit=st.integers(20, 200),
    packing=st.booleans(),
)
@settings(max_examples=40)
def test_plan_covers_every_trained_trajectory_once(seed, steps, ranks, limit, packing):
    batch = make_batch(seed=seed)
    trained = (batch.mask & Mask.TRAINED) != 0
    lengths = np.diff(batch.cu_seqlens)
    plans = plan_iteration(
        batch, trained=trained, steps=steps, ranks=ranks, tokens_per_microbatch=limit, packing=packing
    )
    assert len(plans) == steps
    seen, last_group = [], -1
    for plan in plans:
        assert len({len(rank) for rank in plan.ranks}) == 1
        for micro in (micro for rank in plan.ranks for micro in rank if micro):
            if packing:
                assert sum(lengths[list(micro)]) <= limit
                continue
            assert len(micro) * max(lengths[list(micro)]) <= limit
            assert min(lengths[list(micro)]) >= BUCKET * max(lengths[list(micro)])
        members = [index for rank in plan.ranks for micro in rank for index in micro]
        if members:
            groups = batch.groups[members]
            assert groups.min() > last_group, "a group is in one step, and steps follow claim order"
            last_group = groups.max()
        assert plan.num_sequences == len(members)
        seen += members
        loads = [sum(lengths[i] for micro in rank for i in micro) for rank in plan.ranks]
        assert max(loads) - min(loads) <= lengths.max()
    rows = np.repeat(np.arange(len(lengths)), lengths)
    assert sorted(seen) == sorted(set(rows[trained].tolist()))
    assert sum(plan.num_tokens for plan in plans) == trained.sum()


def test_plan_is_balanced_and_refuses_what_does_not_fit():
    batch = make_batch()
    trained = (batch.mask & Mask.TRAINED) != 0
    counts = [
        len(set(batch.groups[[i for m in p.ranks[0] for i in m]]))
        for p in plan_iteration(batch, trained=trained, steps=4, ranks=1, tokens_per_microbatch=64)
    ]
    assert counts == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="tokens_per_microbatch is 4"):
        plan_iteration(batch, trained=trained, steps=1, ranks=1, tokens_per_microbatch=4)
    with pytest.raises(ValueError, match="adjacent"):
        plan_iteration(
            replace(batch, groups=batch.groups[::-1] % 2), trained=trained, steps=1, ranks=1, tokens_per_microbatch=64
        )


@pytest.mark.parametrize("packing", [True, False])
def test_pack_predicts_each_generated_token_from_the_position_before(packing):
    batch = make_batch()
    trained = (batch.mask & Mask.TRAINED) != 0
    micro = pack(batch, trained=trained, trajectories=(3, 0), packing=packing)
    assert micro.tokens.shape == (1, sum(micro.lengths)) if packing else (2, max(micro.lengths))
    offsets = (0, micro.lengths[0] if packing else micro.tokens.shape[1])
    for row, (trajectory, offset) in enumerate(zip((3, 0), offsets, strict=True)):
        first, last = batch.cu_seqlens[trajectory], batch.cu_seqlens[trajectory + 1]
        generated = np.flatnonzero(batch.mask[first:last] & Mask.GENERATED)
        part = slice(micro.cu_seqlens[row], micro.cu_seqlens[row + 1])
        np.testing.assert_array_equal(micro.positions[part], offset + generated - 1)
        np.testing.assert_array_equal(micro.targets[part], batch.tokens[first + generated])
        np.testing.assert_array_equal(micro.trained[part], trained[first + generated])
        np.testing.assert_array_equal(micro.versions[part], batch.versions[first + generated])
        np.testing.assert_array_equal(
            micro.tokens.reshape(-1)[offset : offset + micro.lengths[row]], batch.tokens[first:last]
        )


# ---- log-probs


def softcapped() -> Gemma2ForCausalLM:
    """A model whose logits are more than a linear map of its hidden states."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=5.0))


@pytest.mark.parametrize(("family", "packing"), [("qwen3", True), ("qwen3", False), ("gemma2", False)])
def test_chunked_logprobs_equal_those_of_single_sequences(model_path, monkeypatch, family, packing):
    torch.manual_seed(1)
    qwen3 = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation=ATTENTION if packing else "sdpa")
    model = softcapped().eval() if family == "gemma2" else qwen3.eval()
    batch = make_batch()
    micro = pack(batch, trained=(batch.mask & Mask.TRAINED) != 0, trajectories=(2, 0, 5), packing=packing)
    tokens, *rest = [
        torch.from_numpy(getattr(micro, name)) for name in ("tokens", "positions", "targets", "temperatures")
    ]
    monkeypatch.setattr(token_scores, "LOGITS_PER_CHUNK", 4 * VOCAB)
    policy = Policy(model)
    assert policy._plain_head == (family == "qwen3")
    layout = Layout.of(micro.lengths, packed=packing, device=torch.device("cpu"))
    logprobs, entropies = policy(tokens, layout, *rest)
    gradients = torch.autograd.grad((logprobs**2).sum() + entropies.sum(), list(model.parameters()))

    single, spread = [], []
    for index in (2, 0, 5):
        part = slice(batch.cu_seqlens[index], batch.cu_seqlens[index + 1])
        ids = torch.from_numpy(batch.tokens[part].astype(np.int64))
        logits = model(ids[None]).logits[0, :-1] / torch.from_numpy(batch.temperatures[part][1:, None])
        values = logits.log_softmax(-1)
        generated = torch.from_numpy((batch.mask[part] & Mask.GENERATED) != 0)[1:]
        single.append(values.gather(1, ids[1:, None])[:, 0][generated])
        spread.append(-(values.exp() * values).sum(1)[generated])
    expected, expected_entropies = torch.cat(single), torch.cat(spread)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    loss = (expected**2).sum() + expected_entropies.sum()
    for gradient, other in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4)


# ---- training


def independent_iteration(config: Config, batch: TrainBatch):
    """The iteration written again: whole sequences one by one, in float64, without FSDP, packing or chunks."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64).eval()
    learner = config.learner
    optimizer = torch.optim.AdamW(model.parameters(), lr=learner.lr, betas=(0.9, 0.95), weight_decay=0.0)
    advantages = pmd_mean(batch.rewards, batch.groups)

    def logprobs(index):
        part = slice(batch.cu_seqlens[index], batch.cu_seqlens[index + 1])
        ids = torch.from_numpy(batch.tokens[part].astype(np.int64))
        logits = model(ids[None]).logits[0, :-1] / torch.from_numpy(batch.temperatures[part][1:, None])
        return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    with torch.no_grad():
        reference = [logprobs(index) for index in range(len(batch.rewards))]
    losses, norms, u_values, tokens = [], [], [], 0
    for chunk in np.array_split(np.unique(batch.groups), learner.steps_per_iteration):
        terms = []
        for index in np.flatnonzero(np.isin(batch.groups, chunk)):
            flags = torch.from_numpy(batch.mask[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]])[1:]
            trained, generated = (flags & Mask.TRAINED) != 0, (flags & Mask.GENERATED) != 0
            if not trained.any():
                continue
            lp = logprobs(index)
            u = ((lp - reference[index])[trained]).sum() + (lp - reference[index]).detach()[generated & ~trained].sum()
            u_values.append(u.item())
            tokens += int(generated.sum())
            terms.append(learner.tau / 2 * (advantages[index] / learner.tau - u) ** 2 / generated.sum())
        optimizer.zero_grad()
        loss = torch.stack(terms).mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), learner.max_grad_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, u_values, tokens, model.state_dict()


def test_train_matches_an_independent_float64_computation(start, model_path):
    config, batch = make_config(model_path), make_batch()
    losses, norms, u_values, tokens, state = independent_iteration(config, batch)
    learner = start(config)
    result = learner.train(batch)
    metrics = result.metrics
    np.testing.assert_allclose(metrics["learner/step_losses"], losses, rtol=1e-5)
    assert metrics["learner/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert metrics["learner/u_mean"] == pytest.approx(np.mean(u_values), rel=1e-3)
    assert metrics["learner/u_std"] == pytest.approx(np.std(u_values), rel=1e-3)
    assert metrics["learner/reference_kl"] == pytest.approx(-sum(u_values) / tokens, rel=1e-3)
    assert metrics["learner/trained_tokens"] == ((batch.mask & Mask.TRAINED) != 0).sum()
    assert metrics["learner/skipped_steps"] == 0
    np.testing.assert_array_equal(result.advantages, pmd_mean(batch.rewards, batch.groups))
    assert json.loads(json.dumps(metrics))["learner/step_losses"] == metrics["learner/step_losses"]
    weights = learner.weights()
    assert set(weights) == {name for name in state if name != "lm_head.weight"}
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor.double(), state[name], rtol=1e-3, atol=2e-4)


def test_micro_batches_do_not_change_the_result(start, model_path):
    configs = [make_config(model_path, tokens_per_microbatch=limit) for limit in (20, 57, 4096)]
    results = [start(config).train(make_batch()).metrics for config in configs]
    for metrics in results[1:]:
        for key in ("learner/step_losses", "learner/grad_norm", "learner/u_std", "learner/mismatch_kl"):
            np.testing.assert_allclose(metrics[key], results[0][key], rtol=1e-5)


def test_same_batches_from_the_same_weights_are_bit_equal(start, model_path):
    learner = start(make_config(model_path))
    first = [learner.train(make_batch(seed=seed)).metrics for seed in (0, 1)]
    weights = learner.weights()
    learner.load_initial()
    assert [learner.train(make_batch(seed=seed)).metrics for seed in (0, 1)] == first
    assert same_weights(learner.weights(), weights)


def test_first_step_has_exactly_no_log_ratio(start, model_path):
    learner = start(make_config(model_path, steps_per_iteration=1))
    metrics = learner.train(make_batch()).metrics
    assert metrics["learner/u_mean"] == metrics["learner/u_std"] == metrics["learner/reference_kl"] == 0.0


def test_mismatch_kl_is_zero_when_engine_and_learner_agree(start, model_path):
    batch = make_batch()
    state = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    behavior = batch.logprobs.copy()
    with torch.no_grad():
        for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            ids = torch.from_numpy(batch.tokens[first:last].astype(np.int64))
            logits = state(ids[None]).logits[0, :-1] / torch.from_numpy(batch.temperatures[first + 1 : last, None])
            behavior[first + 1 : last] = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    # Tokens of older versions are not engine mismatch: shift them.
    behavior[batch.versions < batch.version] += 1.0
    for anchor in ("reference", "behavior"):
        metrics = start(make_config(model_path, anchor=anchor)).train(replace(batch, logprobs=behavior)).metrics
        assert metrics["learner/mismatch_kl"] == pytest.approx(0.0, abs=1e-5)
    off = replace(batch, logprobs=behavior + np.float32(0.5))
    metrics = start(make_config(model_path)).train(off).metrics
    assert metrics["learner/mismatch_kl"] == pytest.approx(0.5, abs=1e-5)
    none = replace(batch, version=7)
    assert start(make_config(model_path)).train(none).metrics["learner/mismatch_kl"] is None


def test_masked_trajectories_and_untrained_tokens_have_no_influence(start, model_path):
    batch = make_batch()
    learner = start(make_config(model_path, u_scope="trained"))
    before = learner.train(batch).metrics["learner/step_losses"]
    behavior, tokens = batch.logprobs.copy(), batch.tokens.copy()
    behavior[(batch.mask & Mask.TRAINED) == 0] = -np.inf
    masked = slice(batch.cu_seqlens[4], batch.cu_seqlens[5])
    tokens[masked] = 1
    learner.load_initial()
    after = learner.train(replace(batch, logprobs=behavior, tokens=tokens)).metrics["learner/step_losses"]
    assert after == before


def test_steps_without_a_trained_token_are_skipped_and_counted(start, model_path):
    learner = start(make_config(model_path, weight_decay=0.1))
    initial = learner.weights()
    metrics = learner.train(make_batch(trained=False)).metrics
    assert metrics["learner/skipped_steps"] == 2
    assert metrics["learner/step_losses"] == [0.0, 0.0]
    assert same_weights(learner.weights(), initial)
    batch = make_batch()
    batch.mask[batch.cu_seqlens[9] :] &= ~np.uint8(Mask.TRAINED)
    metrics = learner.train(batch).metrics
    assert metrics["learner/skipped_steps"] == 1
    assert metrics["learner/step_losses"][1] == 0.0
    assert metrics["learner/loss"] == metrics["learner/step_losses"][0] != 0.0


def test_warm_up_and_optimizer_reset(start, model_path):
    learner = start(make_config(model_path, warmup_steps=8, reset_optimizer=True))
    rates = [learner.train(make_batch(seed=seed)).metrics["learner/lr"] for seed in range(5)]
    np.testing.assert_allclose(rates, np.array([2, 4, 6, 8, 8]) / 8 * 1e-3)
    steps = {int(state["step"]) for state in learner._optimizer.state.values()}
    assert steps == {2}, "moments and step count cover the last iteration only"
    learner = start(make_config(model_path))
    for seed in range(3):
        learner.train(make_batch(seed=seed))
    assert {int(state["step"]) for state in learner._optimizer.state.values()} == {6}


def test_a_reset_optimizer_warms_up_again_and_the_schedule_goes_on(start, model_path):
    settings = {"reset_optimizer": True, "reset_warmup_steps": 4, "warmup_steps": 5}
    learner = start(make_config(model_path, steps_per_iteration=3, **settings))
    rates = [learner.train(make_batch(seed=seed)).metrics["learner/lr"] for seed in range(3)]
    np.testing.assert_allclose(rates, np.array([3 / 5, 1, 1]) * 3 / 4 * 1e-3)  # of the third step of each iteration
    learner = start(make_config(model_path, steps_per_iteration=6, **settings))
    assert learner.train(make_batch()).metrics["learner/lr"] == 1e-3
    with pytest.raises(ValidationError, match="no reset to warm up from"):
        make_config(model_path, reset_warmup_steps=1)


def test_length_reward_enters_with_its_weight(start, model_path):
    batch = make_batch()
    lengths = [
        ((batch.mask[a:b] & Mask.GENERATED) != 0).sum()
        for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    ]
    total = batch.rewards + 0.5 * length_reward(lengths, batch.rewards > 0, batch.groups)
    learner = start(make_config(model_path, length_weight=0.5))
    np.testing.assert_array_equal(learner.train(batch).advantages, pmd_mean(total, batch.groups))


@pytest.mark.parametrize("name", ["token_pmd", "ctpo", "weighted_sft", "gspo"])
def test_other_algorithms_do_not_depend_on_the_split(start, model_path, name):
    losses = []
    for limit in (20, 4096):
        learner = start(make_config(model_path, algorithm=name, tokens_per_microbatch=limit))
        losses.append(learner.train(make_batch()).metrics["learner/step_losses"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4, atol=1e-6)


def test_algorithms_are_found_by_name_and_path(model_path, tmp_path, monkeypatch):
    (tmp_path / "mine_algorithm.py").write_text(
        "from pmdflow.learner.algorithms import ALGORITHMS\nmine = ALGORITHMS['grpo']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_algorithm("mine_algorithm:mine") is ALGORITHMS["grpo"]
    with pytest.raises(ValueError, match="use one of pmd_mean"):
        Learner(config=make_config(model_path, algorithm="pmd"), rank=0)
    with pytest.raises(ValueError, match="cannot be imported"):
        find_algorithm("pmdflow.nothing:here")
    with pytest.raises(ValueError, match="make it an Algorithm"):
        find_algorithm("pmdflow.learner.algorithms:find_algorithm")


def test_bfloat16_keeps_float32_masters_and_publishes_bfloat16(start, model_path):
    exact = start(make_config(model_path)).train(make_batch()).metrics
    learner = start(make_config(model_path, dtype="bfloat16"))
    metrics = learner.train(make_batch()).metrics
    np.testing.assert_allclose(metrics["learner/step_losses"], exact["learner/step_losses"], rtol=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in learner._policy.parameters())
    assert {tensor.dtype for tensor in learner.weights().values()} == {torch.bfloat16}


def test_published_weights_do_not_change_with_later_steps(start, model_path):
    learner = start(make_config(model_path))
    learner.train(make_batch())
    published = learner.weights()
    kept = copy.deepcopy(published)
    learner.train(make_batch(seed=1))
    assert same_weights(published, kept)
    names = [span["name"] for span in learner.drain().spans]
    assert names.count("step") == 4
    assert names.count("reference") == 2
    assert learner.drain().spans == []


def test_missing_model_is_named(start, tmp_path):
    with pytest.raises(ValueError, match=r"model\.path"):
        start(make_config(str(tmp_path / "nothing")))
    torch.distributed.destroy_process_group()


# ---- several ranks


def iterations() -> list[TrainBatch]:
    """Two claims: a veto drops trajectories 2 and 7 of the first; the second trains one alone and has empty steps."""
    first = make_batch(seed=0)
    for index in (2, 7):
        begin = first.cu_seqlens[index]
        first.logprobs[begin + np.flatnonzero(first.mask[begin : first.cu_seqlens[index + 1]] & Mask.TRAINED)[0]] = 9.0
    lonely = make_batch(seed=1, groups=2)
    lonely.mask[lonely.cu_seqlens[1] : lonely.cu_seqlens[3]] &= ~np.uint8(Mask.TRAINED)
    return [first, lonely]


def rank_main(rank: int, config: Config, master: str, directory: str) -> None:
    """Two iterations on one rank, a checkpoint between them; what it saw goes to a file."""
    learner = Learner(config=config, rank=rank)
    learner.setup(master)
    first, second = iterations()
    results = [learner.train(first)]
    learner.save(f"{directory}/saved")
    results.append(learner.train(second))
    seen = {"metrics": [result.metrics for result in results], "left_out": [result.left_out for result in results]}
    torch.save({**seen, "weights": learner.weights()}, f"{directory}/rank-{rank}.pt")
    learner.close()


def test_two_ranks_equal_one_and_resume_at_another_count(start, model_path, tmp_path):
    first, second = iterations()
    settings = {"steps_per_iteration": 4, "veto": True, "importance_weights": "token", "importance_normalize": True}
    one = start(make_config(model_path, **settings))
    expected = [one.train(first).metrics, one.train(second).metrics]
    weights, master = one.weights(), one.address()
    trained = (second.mask & Mask.TRAINED) != 0
    plans = plan_iteration(second, trained=trained, steps=4, ranks=2, tokens_per_microbatch=64)
    assert len(plans[0].ranks[0][0]) == 1
    assert plans[0].ranks[1] == ((),), "one rank only keeps pace"

    config = make_config(model_path, ranks=2, **settings)
    torch.multiprocessing.spawn(rank_main, args=(config, master, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert ranks[0]["metrics"] == ranks[1]["metrics"], "every rank reports the same numbers"
    assert ranks[0]["left_out"] == ranks[1]["left_out"] == [{"filter": [], "veto": [2, 7]}, {"filter": [], "veto": []}]
    assert ranks[1]["weights"] is None
    for metrics, single in zip(ranks[0]["metrics"], expected, strict=True):
        np.testing.assert_allclose(metrics["learner/step_losses"], single["learner/step_losses"], rtol=1e-5)
        assert metrics.keys() == single.keys()
        for key, value in single.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    assert ranks[0]["metrics"][1]["learner/skipped_steps"] == 2
    for name, tensor in weights.items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, rtol=1e-3, atol=2e-4)

    resumed = start(make_config(model_path, **settings))
    resumed.load(str(tmp_path / "saved"))
    again = resumed.train(second).metrics["learner/step_losses"]
    np.testing.assert_allclose(again, ranks[0]["metrics"][1]["learner/step_losses"], rtol=1e-5)


# ---- checkpoints


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


def write_checkpoint(root: Path, iteration: int) -> Manifest:
    manifest = Manifest.new(root, iteration=iteration, version=iteration + 1, lsn=100 * iteration)
    (manifest.writing / "learner").mkdir(parents=True)
    (manifest.writing / "learner" / "shard").write_bytes(bytes([iteration]) * 50)
    (manifest.writing / "meta").write_text("x")
    return commit_checkpoint(root, manifest)


def test_manifest_round_trip(tmp_path):
    root = tmp_path / "checkpoints"
    assert newest_manifest(root) is None
    assert oldest_manifest(root) is None
    for iteration in (2, 9, 10):
        write_checkpoint(root, iteration)
    newest = newest_manifest(root)
    assert (newest.iteration, newest.version, newest.lsn) == (10, 11, 1000)
    assert newest.claims == tuple(range(1, 11))
    assert newest.directory == root / "iteration-000010"
    assert sorted(file.path for file in newest.files) == ["learner/shard", "meta"]
    assert oldest_manifest(root).iteration == 2
    assert manifest_at(root, 9).lsn == 900
    with pytest.raises(PmdflowError, match="2, 9, 10"):
        manifest_at(root, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: made.path.write_bytes(made.path.read_bytes()[:-40]),
        lambda made: made.path.write_text("[]"),
        lambda made: made.path.unlink(),
        lambda made: made.directory.rename(made.writing),
        lambda made: (made.directory / "meta").unlink(),
        lambda made: (made.directory / "learner" / "shard").write_bytes(b"short"),
        lambda made: (made.directory / "learner" / "shard").write_bytes(b"\xff" * 50),
    ],
)
def test_an_incomplete_checkpoint_is_ignored_and_can_be_written_again(tmp_path, damage):
    write_checkpoint(tmp_path, 1)
    damage(write_checkpoint(tmp_path, 2))
    assert newest_manifest(tmp_path).iteration == 1
    leftover = Manifest.new(tmp_path, iteration=2, version=3, lsn=0).writing
    if leftover.exists():
        for path in sorted(leftover.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        leftover.rmdir()
    write_checkpoint(tmp_path, 2)
    assert newest_manifest(tmp_path).iteration == 2


def test_prune_keeps_the_newest_and_removes_orphans(tmp_path):
    for iteration in range(1, 6):
        write_checkpoint(tmp_path, iteration)
    (tmp_path / "iteration-000006.tmp").mkdir()
    (tmp_path / "iteration-000007").mkdir()
    (tmp_path / "iteration-000007.json.tmp").write_text("{")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "iteration-000003" / "meta").unlink()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iteration-000004",
        "iteration-000004.json",
        "iteration-000005",
        "iteration-000005.json",
        "notes.txt",
    ]
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, 0)


def test_commit_refuses_nothing_and_another_root(tmp_path):
    with pytest.raises(ValueError, match="holds no file"):
        commit_checkpoint(tmp_path, Manifest.new(tmp_path, iteration=1, version=1, lsn=1))
    with pytest.raises(ValueError, match="not of"):
        commit_checkpoint(tmp_path, Manifest.new(tmp_path / "other", iteration=1, version=1, lsn=1))


def test_every_named_algorithm_has_a_finite_loss_and_gradient():
    from pmdflow.learner.algorithms import Terms

    config = make_config("unused").learner
    for name, algorithm in ALGORITHMS.items():
        logprobs = torch.linspace(-3, -0.1, 6).requires_grad_()
        terms = Terms(
            logprobs=logprobs,
            anchor=torch.full((6,), -1.0),
            behavior=torch.full((6,), -1.2),
            advantages=torch.from_numpy(algorithm.advantages(np.array([1.0, 0.0]), np.array([0, 0]), config)),
            weights=torch.from_numpy(
                np.ones(2)
                if algorithm.weights is None
                else algorithm.weights(np.array([1.0, 0.0]), np.array([0, 0]), config)
            ),
            trained=torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool),
            scope=torch.ones(6, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, 3, 6]),
            max_tokens=16,
        )
        (gradient,) = torch.autograd.grad(algorithm.loss(terms, config), logprobs)
        assert torch.isfinite(gradient).all(), name
        assert gradient[2] == 0, name
        assert gradient.abs().sum() > 0, name
