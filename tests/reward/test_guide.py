"""The guide of the rewards: its table, its functions and its configuration are as the code has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pmdflow.config.schema import RewardConfig
from pmdflow.reward.function import INPUTS, load_function
from pmdflow.reward.rubric import load_rubric
from tests.support.paths import ROOT

GUIDE = (ROOT / "pmdflow" / "reward" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_its_snippets_run(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = blocks("python")
    (functions / "my_rewards.py").write_text(source)
    (configuration,) = blocks("yaml")
    rubric = load_rubric(RewardConfig.model_validate(yaml.safe_load(configuration)["reward"]))
    scored = rubric(completion=r"\boxed{4}", metadata={"answer": 4}, timeout_s=10.0)
    assert (scored.reward, scored.components) == (1.2, {"my_rewards.brief": 1.0, "math.score": 1.0})
    assert rubric(completion=" ", metadata={"answer": 4}, timeout_s=10.0).outcome == "invalid"
    batch = RewardConfig.model_validate({"functions": [{"function": "my_rewards:together"}]})
    assert load_rubric(batch)(completion="four").reward == 4.0


def test_its_table_is_the_list_of_inputs() -> None:
    assert re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE) == list(INPUTS)


@pytest.mark.parametrize("path", re.findall(r"- `(pmdflow\.reward\.\w+:score)`", GUIDE))
def test_what_is_shipped_can_be_imported(path: str) -> None:
    assert load_function(path).__doc__
