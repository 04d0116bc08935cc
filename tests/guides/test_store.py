"""The store alone: its guide, and the example that trains with transformers and plain PyTorch from its batches."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from pmdflow.store import TrajectoryStore
from pmdflow.types import Mask, TrainBatch
from tests.support.guides import steps
from tests.support.paths import ROOT

EXAMPLE = ROOT / "configs" / "examples" / "replay_buffer.py"
GUIDE = ROOT / "pmdflow" / "store" / "STORE.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("replay_buffer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GROUPS", 2)
    monkeypatch.setattr(module, "MAX_TOKENS", 24)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return module


def test_packed_rows_have_the_log_probs_of_their_generation_and_a_stopped_loop_goes_on(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, claims = example.train, []

    def watched(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: TrainBatch) -> float:
        claims.append(batch)
        with torch.no_grad():
            difference = example.packed_logprobs(model, batch).numpy() - batch.logprobs
        assert np.abs(difference[(batch.mask & Mask.GENERATED) != 0]).max() < 1e-3, "no trajectory sees another"
        if len(claims) == 2:
            raise KeyboardInterrupt
        return train(model, optimizer, batch)

    monkeypatch.setattr(example, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        example.run(tmp_path, iterations=3)
    assert len(example.run(tmp_path, iterations=3)) == 2, "the interrupted iteration and the last"
    assert [claim.iteration for claim in claims] == [1, 2, 2, 3]
    np.testing.assert_array_equal(claims[2].tokens, claims[1].tokens)
    assert len({group for claim in claims for group in claim.groups.tolist()}) == 3 * 2
    trained = torch.load(tmp_path / "weights.pt")["model"]
    first = example.AutoModelForCausalLM.from_pretrained(example.MODEL).state_dict()
    assert any(not torch.equal(first[name], trained[name]) for name in first)
    with TrajectoryStore.read(tmp_path / "store") as store:
        assert list(store.groups()) == [], "what is trained is gone"


def test_the_guide_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for step in steps(GUIDE):
        if step.language == "python":
            exec(step.text, names)
    batch = names["batch"]
    assert isinstance(batch, TrainBatch) and batch.rewards.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_the_store_needs_neither_ray_nor_torch() -> None:
    program = "import sys, pmdflow.store; print([name for name in ('ray', 'torch', 'zarr') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
