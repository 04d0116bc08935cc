"""Model families with windows, sinks and soft caps: engine and learner score as the plain model does, in company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pmdflow.learner.loading import load_model
from pmdflow.learner.policy import Layout, Policy
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from tests.support.engine import Record, full_logprobs, make_engine, prompt, request
from tests.support.families import FAMILIES, write_family

ATOL = 1e-4
"""Log-probs of one model by two float32 implementations; what a token too many or too few changes is above 1e-2."""
PROMPTS = [prompt(length, seed=length) for length in (3, 21, 10)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A folder, and its model with the family's own attention, spelled out."""
    folder = str(tmp_path_factory.mktemp(request.param))
    write_family(request.param, Path(folder))
    return folder, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_the_engine_scores_as_the_plain_model(family: tuple[str, Any]) -> None:
    folder, plain = family
    engine = make_engine(folder, num_slots=3)
    for id, tokens in enumerate(PROMPTS):
        engine.add(request(id, tokens, remaining=9 + 4 * id, min_tokens=5))
    record = Record().run(engine, steps=4)  # newcomers and decoding rows, interrupted once
    engine.load_weights(1, plain.state_dict(), on_new_weights="reprefill")
    record.run(engine)
    for id, tokens in record.tokens.items():
        expected = full_logprobs(plain, PROMPTS[id], tokens, temperature=1.0)
        torch.testing.assert_close(torch.tensor(record.logprobs[id]), expected, atol=ATOL, rtol=0)


def test_rounding_to_half_precision_passes_the_self_check(family: tuple[str, Any]) -> None:
    folder, _ = family
    engine = TransformersEngine(model_path=folder, dtype="bfloat16", num_slots=3, threads=1, seed=0, device="cpu")
    assert engine.num_slots == 3


@pytest.mark.parametrize("packing", [True, False])
def test_the_learner_scores_as_the_plain_model(family: tuple[str, Any], packing: bool) -> None:
    folder, plain = family
    policy = Policy(load_model(folder, packing=packing).eval())
    loss, expected = torch.zeros(()), torch.zeros(())
    alone = [alone_scores(plain, tokens) for tokens in PROMPTS]
    for got, other in zip(packed_scores(policy, packing=packing), alone, strict=True):
        torch.testing.assert_close(got, other, atol=ATOL, rtol=0)
        loss, expected = loss + got.square().mean(), expected + other.square().mean()
    gradients = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(plain.parameters()), allow_unused=True)
    for gradient, plain_gradient in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (plain_gradient is None)
        if gradient is not None:
            atol = 1e-4 * float(plain_gradient.abs().max()) + 1e-6
            torch.testing.assert_close(gradient, plain_gradient, atol=atol, rtol=0)


def packed_scores(policy: Policy, *, packing: bool) -> Iterator[torch.Tensor]:
    """Log-probs of the tokens after the first of each prompt, all of them in one micro-batch."""
    lengths = tuple(map(len, PROMPTS))
    rows = [torch.tensor(tokens) for tokens in PROMPTS]
    ids = torch.cat(rows)[None] if packing else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    starts = [sum(lengths[:i]) if packing else i * max(lengths) for i in range(len(lengths))]
    positions = torch.cat([start + torch.arange(n - 1) for start, n in zip(starts, lengths, strict=True)])
    targets = torch.cat([row[1:] for row in rows])
    layout = Layout.of(lengths, packed=packing, device=torch.device("cpu"))
    scores = policy(ids, layout, positions, targets, torch.ones(len(targets)))
    yield from scores.logprobs.split([n - 1 for n in lengths])


def alone_scores(plain: Any, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor(tokens)
    scores: torch.Tensor = plain(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return scores
