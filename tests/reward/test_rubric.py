"""The rubric: outcomes, bounds, and functions that get what they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pmdflow.config.schema import RewardConfig
from pmdflow.reward.rubric import load_rubric
from tests.support.reward import make_config


def score(config: RewardConfig, completion: str) -> Any:
    return load_rubric(config)(completion=completion, prompt="?", metadata={})


@pytest.mark.usefixtures("functions")
def test_reward_is_the_weighted_sum_and_components_are_unweighted() -> None:
    config = RewardConfig.model_validate(
        {"functions": [{"function": "graders:length", "weight": 0.5}, {"function": "graders:obey", "weight": -2.0}]}
    )
    scored = score(config, "3.0")
    assert (scored.outcome, scored.reward) == ("scored", -4.5)
    assert scored.components == {"graders.length": 3.0, "graders.obey": 3.0}


@pytest.mark.usefixtures("functions")
def test_an_invalid_completion_gets_the_configured_reward() -> None:
    scored = score(make_config("graders:length", "graders:obey", invalid=-0.25), "invalid")
    assert (scored.outcome, scored.reward) == ("invalid", -0.25)
    assert scored.components == {"graders.length": 0.0, "graders.obey": 0.0}
    assert "no answer" in scored.message


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("completion", "message"),
    [("nan", "nan"), ("-inf", "-inf"), ("raise", "KeyError: 'oops'"), ("text", "'1.0'"), ("none", "None")],
)
def test_whatever_is_not_a_finite_number_is_an_infra_failure(completion: str, message: str) -> None:
    scored = score(make_config(), completion)
    assert scored.outcome == "infra_failure"
    assert "graders.obey" in scored.message
    assert message in scored.message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.graders:obey", "nowhere.graders.*No module named 'nowhere'"),
        ("graders:obay", "did you mean 'obey'"),
        ("graders:os", "a module, not a function"),
        ("broken:f", "cannot import broken: ZeroDivisionError"),
    ],
)
def test_an_unusable_path_is_named_with_its_cause(functions: Path, path: str, message: str) -> None:
    (functions / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=rf"reward\.functions\[1\].*{path}.*{message}"):
        load_rubric(make_config("graders:length", path))


@pytest.mark.usefixtures("functions")
def test_a_function_listed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        load_rubric(make_config("graders:obey", "graders:obey"))
