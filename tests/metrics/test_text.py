"""Numbers as text."""

from __future__ import annotations

import doctest

import pytest

from pmdflow.metrics import text


def test_the_examples_hold() -> None:
    failed, attempted = doctest.testmod(text)
    assert attempted == 3 and not failed


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (9e4, "25 h 0 min")],
)
def test_durations_carry_over(seconds: float, words: str) -> None:
    assert text.duration(seconds) == words


def test_what_was_not_measured_is_a_dash() -> None:
    assert (text.number("?", 2), text.percent(None, 1)) == ("-", "-")
