"""The names that acceptance tests call: module, positional and keyword arguments, defaults."""

from __future__ import annotations

import importlib
import inspect

import pytest

ADVANTAGE, OBJECTIVE, LENGTH = "pmdflow.learner.advantage", "pmdflow.learner.objective", "pmdflow.reward.length"
BINDING = [
    (ADVANTAGE, "pmd_mean", lambda rewards, groups, *, leave_one_out=True, singleton="reward": None),
    (ADVANTAGE, "pmd_partition", lambda rewards, groups, *, tau, leave_one_out=True, floor=None: None),
    (ADVANTAGE, "boltzmann_weights", lambda rewards, groups, *, tau: None),
    (ADVANTAGE, "keep_groups", lambda rewards, groups, *, low=None, high=None: None),
    (ADVANTAGE, "grpo", lambda rewards, groups, *, eps=1e-6, scale_by_std=True: None),
    (
        OBJECTIVE,
        "pmd_loss",
        lambda logprobs, reference_logprobs, advantages, mask, *, tau, aggregation="seq-mean-token-mean", weights=None,
        cu_seqlens=None, generated_mask=None, norm_length=None: None,
    ),
    (OBJECTIVE, "pmd_squared", lambda rewards_minus_baseline, u, *, tau: None),
    (
        OBJECTIVE,
        "token_pmd_loss",
        lambda logprobs, reference_logprobs, advantages, mask, *, alpha, beta, tau, cu_seqlens=None: None,
    ),
    (
        OBJECTIVE,
        "ctpo_loss",
        lambda logprobs, behavior_logprobs, advantages, mask, *, eps_low, eps_high, cu_seqlens=None: None,
    ),
    (OBJECTIVE, "weighted_sft_loss", lambda logprobs, mask, weights: None),
    (OBJECTIVE, "grpo_loss", lambda logprobs, old_logprobs, advantages, mask: None),
    (OBJECTIVE, "gspo_loss", lambda logprobs, old_logprobs, advantages, mask: None),
    (
        OBJECTIVE,
        "importance_weights",
        lambda old_logprobs, behavior_logprobs, mask, *, level="token", cap=2.0, normalize=False: None,
    ),
    (OBJECTIVE, "veto", lambda old_logprobs, behavior_logprobs, mask: None),
    (LENGTH, "length_reward", lambda lengths, correct, groups: None),
    ("pmdflow.reward.tool_call", "tool_call_score", lambda expected, calls, *, high=3.0, low=-3.0: None),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "binding"), BINDING, ids=[name for _, name, _ in BINDING])
def test_arguments_are_the_binding_ones(module, name, binding):
    found = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    for wanted in inspect.signature(binding).parameters.values():
        parameter = found[wanted.name]
        assert (parameter.kind, parameter.default) == (wanted.kind, wanted.default), wanted.name
    positional = [p.name for p in found.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == [
        p.name for p in inspect.signature(binding).parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY
    ], "in this order"
    extra = [p for p in found.values() if p.name not in inspect.signature(binding).parameters]
    assert all(p.default is not inspect.Parameter.empty for p in extra), "what is more is optional"
