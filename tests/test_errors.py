"""Errors: what the command line prints of them, and that they cross processes whole."""

from __future__ import annotations

import pickle

import pytest

from pmdflow.config.errors import ConfigError, ConfigIssue, Place
from pmdflow.errors import LaunchError, PmdflowError, PromptTooLong, WaitTimeout


def test_a_remedy_stands_after_a_blank_line() -> None:
    assert LaunchError("port 80 is taken", hint="choose another").report() == (
        "error: port 80 is taken\n\nhint: choose another"
    )
    assert LaunchError("no remedy is known").report() == "error: no remedy is known"


def test_who_quotes_an_error_quotes_its_hint() -> None:
    cause = WaitTimeout("the store was not on disk within 60 s", hint="look at its disk")
    assert str(PmdflowError(f"saving failed: {cause}")).endswith("within 60 s\n\nhint: look at its disk")


@pytest.mark.parametrize("kind", [PmdflowError, LaunchError, PromptTooLong])
def test_an_error_arrives_whole_in_another_process(kind: type[PmdflowError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("too long", hint="shorten it")))
    assert (type(copy), str(copy), copy.hint) == (kind, "too long\n\nhint: shorten it", "shorten it")


def test_a_configuration_error_arrives_with_all_its_issues() -> None:
    issues = [ConfigIssue(message=f"mistake {line}", place=Place(source="a.yaml", line=line)) for line in (3, 1)]
    copy = pickle.loads(pickle.dumps(ConfigError(issues)))
    assert [issue.place.line for issue in copy.issues] == [1, 3]
    assert copy.report().endswith("2 errors; nothing was started")
