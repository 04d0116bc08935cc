"""Evaluation needs no Ray: nothing of ours imports it there (vLLM does on its own, where it is installed)."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.paths import ROOT, TINY

PROGRAM = """
import json, sys
import numpy as np
from pathlib import Path
from pmdflow.evaluate.command import EvalOptions, eval_config, find_checkpoint
from pmdflow.evaluate.task import evaluate
from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.make import make_engine

config = eval_config(find_checkpoint(Path(sys.argv[1])), "reasoning_gym/chain_sum", EvalOptions())
engine = make_engine(config, seed=0)
engine.add(Request(id=0, tokens=np.array([5, 6], np.int32), limit=9, remaining=9, temperature=1.0))
assert engine.step()
engine.close()
print(json.dumps([name for name in sys.modules if name.partition(".")[0] == "ray"]))
"""


def test_an_engine_for_an_evaluation_loads_no_ray() -> None:
    arguments = [sys.executable, "-c", PROGRAM, str(TINY)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
