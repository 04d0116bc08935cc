"""An engine that cannot compute a model ends the run with its own first error, not after deaths without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.families import write_family
from tests.support.runs import Up, small_config


@pytest.mark.timeout(300)
def test_what_an_engine_refuses_at_its_start_ends_the_run_by_name(tmp_path: Path) -> None:
    write_family("doge", tmp_path / "model")
    config = small_config(tmp_path, model__path=str(tmp_path / "model"), eval__prompts=0)
    config["data"] |= {"max_tokens": 24, "max_prompt_tokens": 64}
    up = Up(tmp_path, config)
    assert up.wait() == 1
    assert "error: rollout-0 cannot start: the transformers engine cannot compute a doge (RuntimeError: " in up.output
    assert "set rollout.engine to vllm" in up.output and "Traceback" not in up.output
    assert not [event for event in up.events() if event["kind"] == "actor_died"]
