"""A reward that never works ends the run and says why, instead of training nothing for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import Up, small_config


@pytest.mark.timeout(300)
def test_a_reward_that_always_fails_ends_the_run_with_its_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_reward.py").write_text("def score(*, completion):\n    return None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    functions = [{"function": "no_reward:score"}]
    up = Up(tmp_path, small_config(tmp_path, reward__functions=functions, run__iterations=1000))
    assert up.wait() == 1
    assert "reward-0 failed: 100 scorings in a row failed" in up.output
    assert "the first: no_reward.score: TypeError: returned None, not a number" in up.output
