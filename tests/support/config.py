"""Configuration files of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.config.errors import ConfigError, ConfigIssue
from pmdflow.config.load import load

MINIMAL = """\
run:
  name: small
  iterations: 3
model:
  path: nowhere
data:
  task: reasoning_gym/chain_sum
  max_tokens: 64
reward:
  functions:
    - function: pmdflow.reward.reasoning_gym:score
scheduler:
  groups_per_iteration: 4
  tokens_per_iteration: 1000
"""


def refuse(path: Path, *overrides: str) -> tuple[ConfigIssue, ...]:
    """What is wrong with a file and overrides that must not load."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.issues


def edit(path: Path, *replacements: tuple[str, str]) -> None:
    """Replace texts that stand in the file once."""
    text = path.read_text()
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
