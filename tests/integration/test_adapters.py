"""Runs in environments of other libraries, as `configs/examples` has them: offline, with a tiny model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from pmdflow.config.load import load
from pmdflow.store.archive import parts, read_part
from tests.support.paths import CONFIGS
from tests.support.runs import Up

DEADLINE_S = 600.0

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(700)]


@pytest.mark.parametrize("library", ["verifiers", "openenv"])
def test_it_trains(library: str, tmp_path: Path) -> None:
    if find_spec(library) is None:
        pytest.skip(f"needs uv sync --extra {library}")
    shorter = [f"run.dir={tmp_path}", "run.iterations=2", "eval.prompts=8", "scheduler.groups_per_iteration=2"]
    shorter.append("learner.steps_per_iteration=2")
    values = load(CONFIGS / "examples" / f"{library}.yaml", shorter).config.model_dump()
    up = Up(tmp_path, values)
    assert up.wait(DEADLINE_S) == 0, up.output
    assert not [event for event in up.events() if event["kind"].startswith("environment")]
    batches = [read_part(path) for path in parts(up.run)]
    assert len(batches) == 2
    for batch in batches:
        said = [0.0] * len(batch.rewards)
        for row, _, rewards, _ in batch.turns:
            said[row] += rewards.get("reward", 0.0)
        assert said == batch.rewards.tolist()
