"""A model that engine or learner score otherwise than transformers does is refused at start, by name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from pmdflow.learner.agreement import check_policy
from pmdflow.learner.loading import load_model
from pmdflow.learner.policy import Policy
from pmdflow.rollout.engines.transformers.self_check import check_cached
from tests.support.engine import EOS, make_engine
from tests.support.paths import TINY


class RowPositions(torch.nn.Embedding):
    """Counts positions along the row, whatever it is told: right for a sequence alone, wrong in company or a cache."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.arange(input.shape[-1])[None])


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=EOS)).save_pretrained(tmp_path)
    return str(tmp_path)


def break_positions(model: Any) -> None:
    right = model.transformer.wpe
    model.transformer.wpe = RowPositions(*right.weight.shape, _weight=right.weight.detach())


def test_a_learner_that_disagrees_is_refused_with_the_difference(folder: str) -> None:
    packed, padded = (Policy(load_model(folder, packing=packing).eval()) for packing in (True, False))
    check_policy(packed, packing=True)
    for policy in (packed, padded):
        break_positions(policy.model)
    message = r"packed rows, in company\) and a plain .* of a gpt2 .* up to \d.* nats.*; set learner.packing to false"
    with pytest.raises(ValueError, match=message):
        check_policy(packed, packing=True)
    check_policy(padded, packing=False)


@pytest.mark.parametrize("num_slots", [1, 3])
def test_an_engine_that_disagrees_is_refused_with_the_difference(folder: str, num_slots: int) -> None:
    cached = make_engine(folder, num_slots=num_slots)._model
    break_positions(cached._model)
    with pytest.raises(ValueError, match=r"engine \(alone\) and a plain .* gpt2 .* nats.*; set rollout.engine to vllm"):
        check_cached(cached, cached._model, num_slots=num_slots)


def test_weights_that_are_not_numbers_are_refused(folder: str) -> None:
    model = load_model(folder, packing=True).eval()
    with torch.no_grad():
        model.transformer.wpe.weight[2] = torch.nan
    with pytest.raises(ValueError, match="differ by up to nan nats"):
        check_policy(Policy(model), packing=True)


def test_what_the_code_of_a_family_raises_is_a_refusal_by_name(folder: str) -> None:
    cached = make_engine(folder)._model
    cached._model.transformer.wpe = torch.nn.Embedding(4, 32)  # fewer positions than it says
    with pytest.raises(ValueError, match=r"engine cannot compute a gpt2 \(IndexError: .*set rollout.engine to vllm"):
        check_cached(cached, cached._model, num_slots=8)


def test_the_check_takes_little_of_the_quick_start() -> None:
    policy = Policy(load_model(str(TINY), packing=True).eval())
    cached = make_engine(str(TINY))._model
    before = time.process_time()
    check_policy(policy, packing=True)
    check_cached(cached, cached._model, num_slots=8)
    assert time.process_time() - before < 2
