"""The worked example of an environment, and how environments are found."""

from __future__ import annotations

import pytest

from pmdflow.config.schema import EnvironmentConfig
from pmdflow.environments.calculator import Calculator
from pmdflow.environments.protocol import Environment, Observation, load_environment


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("so [12 + 30]", " = 42\n"),
        ("[5 - 7 - 1]", " = -3\n"),
        ("[-5]", " = -5\n"),
        ("[1 +]", " = ?\n"),
        ("5]", " = 5\n"),
    ],
)
def test_the_calculator(action: str, text: str) -> None:
    assert Calculator().step(key="k", action=action) == Observation(text=text)
    assert Calculator().step(key="k", action="answer: 42") == Observation(done=True)


class Broken(Calculator):
    """Cannot be made."""

    def __init__(self) -> None:
        """Fail."""
        raise RuntimeError("no display")


def test_a_wrong_factory_is_named() -> None:
    with pytest.raises(ValueError, match=r"environment.factory pmdflow.environments.calculator:Abacus"):
        load_environment(EnvironmentConfig(factory="pmdflow.environments.calculator:Abacus"))
    with pytest.raises(ValueError, match="base"):
        load_environment(EnvironmentConfig(factory="pmdflow.environments.calculator:Calculator", args={"base": 2}))
    with pytest.raises(ValueError, match=r"environment.factory .*Broken.*RuntimeError: no display"):
        load_environment(EnvironmentConfig(factory=f"{__name__}:Broken"))
    environment: Environment = load_environment(EnvironmentConfig(factory=f"{Calculator.__module__}:Calculator"))()
    assert environment.reset(key="k", prompt="", metadata={}) == Observation()
