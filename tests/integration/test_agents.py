"""Agent programs on real runs: an unmodified OpenAI client is what rolls out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask
from tests.support.chat_model import chat_model
from tests.support.runs import Up, assert_exact, small_config

PATIENCE_S = 150.0


def agent_config(tmp_path: Path, program: str, **overrides: Any) -> dict[str, Any]:
    config = small_config(tmp_path, run__iterations=2, eval__prompts=2, data__group_size=2, **overrides)
    config["scheduler"] |= {"groups_per_iteration": 2}
    config["model"]["path"] = str(chat_model(tmp_path / "model"))
    config["reward"] = {"functions": [{"function": "pmdflow.reward.said:score"}]}
    config["agents"] = {"program": f"tests.support.agent_programs:{program}", "concurrency": 4, "timeout_s": 60}
    return config


def test_an_unmodified_client_drives_a_run(tmp_path: Path) -> None:
    up = Up(tmp_path, agent_config(tmp_path, "two_turns"))
    assert up.wait(PATIENCE_S) == 0, up.output
    assert_exact(up)
    for path in parts(up.run):
        claim = read_part(path)
        for start, end in zip(claim.cu_seqlens, claim.cu_seqlens[1:], strict=False):
            turns = (claim.mask[start:end] & Mask.GENERATED) != 0
            assert int((turns[1:] & ~turns[:-1]).sum()) == 2, "two turns are generated"
