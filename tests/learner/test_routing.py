"""Experts of a Mixture of Experts: recorded by the engine, and taken again by the learner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pmdflow.config.schema import Config
from pmdflow.learner.routing import EXPERTS, Routing
from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.types import Mask, TrainBatch
from tests.support.learner import make_batch, make_config

torch.set_num_threads(1)
LAYERS, CHOICES, VOCAB = 2, 2, 128


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory) -> str:
    """Qwen3-MoE of 2 layers with 8 experts each, of which a token takes 2."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=CHOICES,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=VOCAB,
        max_position_embeddings=96, eos_token_id=0, norm_topk_prob=True, initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("moe")
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return str(path)


def generated(path: str, *, dtype: str, sequences: int = 12, tokens: int = 16) -> TrainBatch:
    """What the transformers engine generates, with the experts that it took, as a claim of its own version."""
    engine = TransformersEngine(
        model_path=path, dtype=dtype, num_slots=sequences, threads=1, seed=3, device="cpu", record_experts=True
    )
    random, found = np.random.default_rng(0), {}
    for number in range(sequences):
        prompt = random.integers(1, VOCAB, 4 + number % 3).astype(np.int32)
        engine.add(Request(id=number, tokens=prompt, limit=tokens, remaining=tokens, temperature=0.8))
        found[number] = (prompt, [], [], [])
    while engine.active():
        for output in engine.step():
            _, ids, logprobs, experts = found[output.id]
            ids.extend(output.tokens)
            logprobs.extend(output.logprobs)
            experts.extend(output.columns[EXPERTS])
    parts = [(len(prompt), len(ids)) for prompt, ids, *_ in found.values()]

    def packed(before, after, dtype):
        return np.concatenate([np.concatenate([np.full(p, before), a]) for (p, _), a in after]).astype(dtype)

    pairs = list(zip(parts, found.values(), strict=True))
    zeros = [np.concatenate([np.zeros((p, LAYERS, CHOICES)), np.stack(own[3])]) for (p, _), own in pairs]
    plain = make_batch(groups=sequences // 3)
    return replace(
        plain,
        tokens=np.concatenate([np.concatenate([own[0], own[1]]) for _, own in pairs]).astype(np.int32),
        logprobs=packed(0.0, [(part, own[2]) for part, own in pairs], np.float32),
        versions=packed(-1, [(part, np.full(part[1], plain.version)) for part in parts], np.int32),
        temperatures=packed(1.0, [(part, np.full(part[1], 0.8)) for part in parts], np.float32),
        mask=packed(0, [(part, np.full(part[1], Mask.GENERATED | Mask.TRAINED)) for part in parts], np.uint8),
        cu_seqlens=np.cumsum([0, *(p + n for p, n in parts)]).astype(np.int64),
        prompt_lengths=np.array([p for p, _ in parts], np.int32),
        extra={EXPERTS: np.concatenate(zeros).astype(np.uint8)},
    )


def plain_choices(path: str, batch: TrainBatch) -> np.ndarray:
    """What the whole model chooses where each token was drawn, sorted, plus one [P, L, k]."""
    model = AutoModelForCausalLM.from_pretrained(path)
    routing, found = Routing(model), []
    for first, last, prompt in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.prompt_lengths, strict=False):
        with torch.no_grad():
            model(torch.from_numpy(batch.tokens[None, first:last].astype(np.int64)))
        found.append(routing.taken()[prompt - 1 : -1].sort(-1).values)
    return torch.cat(found).numpy()


def test_the_engine_records_what_computed_each_tokens_logits(moe_path) -> None:
    batch = generated(moe_path, dtype="float32")
    own = batch.extra[EXPERTS][batch.versions >= 0]
    assert own.dtype == np.uint8 and own.min() >= 1 and own.max() <= 8
    assert (np.sort(own, axis=-1) == plain_choices(moe_path, batch)).mean() > 0.99


def test_replaying_ones_own_choices_changes_nothing_and_others_are_taken(start, moe_path) -> None:
    batch = generated(moe_path, dtype="float32")
    settings = {"steps_per_iteration": 1, "tokens_per_microbatch": 96}
    free = start(make_config(moe_path, **settings)).train(batch)
    replayed = start(replaying(moe_path, **settings)).train(batch)
    for key in ("learner/mismatch_kl", "learner/grad_norm", "learner/entropy"):
        assert replayed.metrics[key] == pytest.approx(free.metrics[key], rel=1e-5, abs=1e-7)
    others = np.where(batch.extra[EXPERTS] > 0, 9 - batch.extra[EXPERTS], 0).astype(np.uint8)
    forced = start(replaying(moe_path, **settings)).train(replace(batch, extra={EXPERTS: others}))
    assert forced.metrics["learner/entropy"] != pytest.approx(free.metrics["learner/entropy"], rel=1e-3)


def test_what_is_computed_again_in_the_backward_pass_takes_the_same(start, moe_path) -> None:
    batch = generated(moe_path, dtype="float32")
    others = np.where(batch.extra[EXPERTS] > 0, 9 - batch.extra[EXPERTS], 0).astype(np.uint8)
    batch = replace(batch, extra={EXPERTS: others})
    norms = [
        start(replaying(moe_path, activation_checkpointing=again)).train(batch).metrics["learner/grad_norm"]
        for again in (False, True)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def replaying(path: str, **learner):
    return make_config(path, router_replay=True, **{"tokens_per_microbatch": 96, **learner})


def test_replay_takes_away_what_flipped_experts_add_to_the_mismatch(start, moe_path) -> None:
    batch = generated(moe_path, dtype="bfloat16", sequences=24, tokens=32)
    flipped = (np.sort(batch.extra[EXPERTS][batch.versions >= 0], axis=-1) != plain_choices(moe_path, batch)).mean()
    found = {}
    for replay in (False, True):
        config = make_config(
            moe_path, dtype="bfloat16", router_replay=replay, tokens_per_microbatch=96, steps_per_iteration=1
        )
        found[replay] = start(config).train(batch).metrics["learner/mismatch_kl"]
    print(f"\nmismatch_kl {found[False]:.3g} without, {found[True]:.3g} with replay; {flipped:.2%} of choices differ")
    assert abs(found[True]) <= abs(found[False]) + 1e-4


def test_what_cannot_be_replayed_is_refused(start, moe_path, tmp_path: Path) -> None:
    learner = start(replaying(moe_path))
    with pytest.raises(ValueError, match="reads the extra column 'experts'"):
        learner.train(make_batch())
    batch = generated(moe_path, dtype="float32", sequences=3)
    with pytest.raises(ValueError, match=r"has \(2, 1\) experts a token, the model \(2, 2\)"):
        learner.train(replace(batch, extra={EXPERTS: batch.extra[EXPERTS][..., :1]}))
    dense = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=64))
    with pytest.raises(ValueError, match=r"a qwen3 has 0 routers .*set learner\.router_replay to false"):
        Routing(dense)
    config = make_config(moe_path, router_replay=True).model_dump()
    config["rollout"]["engine"] = "simulated"
    with pytest.raises(ValueError, match=r"rollout\.engine is simulated: only the transformers engine"):
        Config.model_validate(config)
