"""Evaluation needs no Ray: nothing of ours imports it there (vLLM does on its own, where it is installed)."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.paths import ROOT, TINY

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from pmdflow.evaluate.checkpoint import find_checkpoint, make_engine_of
from pmdflow.evaluate.command import EvalOptions, eval_config
from pmdflow.rollout.engine import Request

checkpoint = find_checkpoint(Path(sys.argv[1]))
engine = make_engine_of(checkpoint, eval_config(checkpoint, "reasoning_gym/chain_sum", EvalOptions()), seed=0)
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
