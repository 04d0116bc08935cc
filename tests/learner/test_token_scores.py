"""Log-probs and entropies of tokens: in chunks, packed, and against whole sequences one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from pmdflow.learner import token_scores
from pmdflow.learner.attention import ATTENTION
from pmdflow.learner.batch import pack
from pmdflow.learner.policy import Layout, Policy
from pmdflow.types import Mask
from tests.support.learner import LOGPROB_SIZE, ROUNDINGS, VOCAB, make_batch
from tests.support.numeric import assert_close

torch.set_num_threads(1)
SIZE = 30.0
"""Of five products of normal numbers, at a temperature of 0.5 and more."""


def naive_scores(hidden, weight, bias, targets, temperatures):
    values = log_softmax((hidden @ weight.T + bias) / temperatures[:, None], 1)
    return values.gather(1, targets[:, None])[:, 0], -(values.exp() * values).sum(1)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_scores_and_gradients_do_not_depend_on_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(token_scores, "LOGITS_PER_CHUNK", chunk * 11)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((7, 5), (11, 5), (11,))]
    targets, temperatures = torch.randint(0, 11, (7,)), torch.rand(7) + 0.5
    upstream = torch.randn(2, 7)
    for used in ((0, 1), (0,), (1,)):
        ours = token_scores.token_scores(*inputs, targets, temperatures)
        naive = naive_scores(*inputs, targets, temperatures)
        for index in used:
            assert_close(ours[index].detach(), naive[index].detach(), roundings=5 * 11, size=SIZE)
        wanted = [
            torch.autograd.grad(sum((upstream[i] * scores[i]).sum() for i in used), inputs) for scores in (ours, naive)
        ]
        for gradient, expected in zip(*wanted, strict=True):
            assert_close(gradient, expected, roundings=5 * 11 * 7, size=SIZE)


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch):
    monkeypatch.setattr(token_scores, "LOGITS_PER_CHUNK", 16 * 100)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight = torch.randn(640, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with Watch():
        scores = token_scores.token_scores(hidden, weight, None, torch.zeros(640, dtype=torch.int64), torch.ones(640))
        (scores.logprobs.sum() + scores.entropies.sum()).backward()
    assert largest <= 640 * 4, "hidden states are the largest, not 640 x 100 logits"


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
    logprobs, entropies = policy(tokens, layout, *rest)[:2]
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
    assert_close(logprobs.detach(), expected.detach(), roundings=ROUNDINGS, size=LOGPROB_SIZE)
    assert_close(entropies.detach(), expected_entropies.detach(), roundings=ROUNDINGS, size=LOGPROB_SIZE)
    loss = (expected**2).sum() + expected_entropies.sum()
    for gradient, other in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        # Its sums run over some 30 tokens, and signs cancel: they are as large as its largest element and larger.
        assert_close(gradient, other, roundings=2 * ROUNDINGS, size=4 * float(other.abs().max()))
