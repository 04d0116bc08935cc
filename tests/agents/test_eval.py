"""What `pmdflow eval` says of a run whose rollouts are agent programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pmdflow.errors import LaunchError
from pmdflow.evaluate.checkpoint import find_checkpoint
from pmdflow.evaluate.command import EvalOptions, eval_config
from tests.support.paths import TINY
from tests.support.runs import small_config


def test_a_task_of_agent_programs_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(yaml.safe_dump({**small_config(tmp_path), "agents": {"command": ["agent"]}}))
    with pytest.raises(LaunchError, match="made by agent programs"):
        eval_config(find_checkpoint(TINY), str(file), EvalOptions())
