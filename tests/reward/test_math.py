"""Mathematical answers: labelled by hand, and hostile ones that end in time."""

from __future__ import annotations

import contextlib
import time

import pytest

from pmdflow.reward import math
from pmdflow.reward.rubric import InvalidCompletion
from tests.reward.math_answers import ANSWERS

ROWS = [row for rows in ANSWERS.values() for row in rows]
DISAGREE = {
    (r"\frac{1}{3}", r"\boxed{0.333333}"): "decimals count as equal from six places on",
    ("0.3333", r"\boxed{\frac{1}{3}}"): "a rounded reference is not known for one",
    (r"\frac{\pi}{6}", r"\boxed{30^\circ}"): "degrees are dropped",
    (r"\frac{\sqrt{3}}{2}", r"\boxed{\sin 60^\circ}"): "degrees are dropped",
    (r"5 \text{ cm}", r"\boxed{5 \text{ m}}"): "units are dropped without a look at which",
    ("42", "The answer is either 42 or 43."): "of several answers without a box one counts",
}
"""Where math-verify and the examiner part, as the module says."""
HOSTILE = {
    "a tower of powers": r"\boxed{9^{9^{9^{9}}}}",
    "factorials of factorials": r"\boxed{((10!)!)!}",
    "powers of long numbers": r"\boxed{" + "9" * 100 + "^{" + "9" * 100 + "}}",
    "nested brackets": r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "nested roots": r"\boxed{" + r"\sqrt{" * 200 + "2" + "}" * 200 + "}",
    "a long sum": r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^2+n!}}",
    "a power in plain text": "The answer is 9**9**9**9**9",
    "a large binomial": r"\boxed{\binom{10^9}{5\cdot 10^8}}",
    "boxes that do not close": r"\boxed{" * 20_000,
    "boxes in a row": r"\boxed{1}" * 20_000,
    "braces": "{" * 100_000,
    "dollars": "$" * 100_000,
    "words that begin an answer": "answer " * 20_000,
    "half a character": "\\boxed{\ud800}",
    "a program": r"\boxed{__import__('os').system('kill -9 -1')}",
}
NIGHTLY = ("factorials of factorials", "powers of long numbers", "nested roots", "a large binomial")
"""Of those that take all their time, the ones that only the long form tries."""


def score(reference: object, completion: str, *, timeout_s: float = 60.0) -> float:
    return math.score(completion=completion, metadata={"answer": reference}, timeout_s=timeout_s)


def accepts(reference: object, completion: str) -> bool:
    try:
        return score(reference, completion) == 1.0
    except InvalidCompletion:
        return False


@pytest.mark.timeout(300)
def test_answers_are_judged_as_by_hand() -> None:
    assert len(ROWS) == 200
    found = {(reference, text) for reference, text, right in ROWS if accepts(reference, text) != right}
    assert found == set(DISAGREE)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name in NIGHTLY else name for name in HOSTILE]
)
def test_a_hostile_answer_ends_in_time_and_is_not_right(name: str) -> None:
    started = time.monotonic()
    with contextlib.suppress(InvalidCompletion):
        assert score("42", HOSTILE[name], timeout_s=3.0) == 0.0
    assert time.monotonic() - started < 30.0  # half of 3 s, and patience with a busy machine


def test_what_no_answer_can_be_right_about_is_no_fault_of_the_answer() -> None:
    with pytest.raises(ValueError, match="lacks 'answer'"):
        math.score(completion=r"\boxed{1}", metadata={}, timeout_s=10.0)
    with pytest.raises(ValueError, match=r"metadata\['answer'\] is '\(\(.*cannot be read"):
        score("(" * 900 + "1" + ")" * 900, r"\boxed{1}", timeout_s=2.0)
    assert score(42, r"\boxed{42}") == 1.0
    assert score(0.5, r"\boxed{\frac{1}{2}}") == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"<think>\boxed{1}</think> so \boxed{2}", ("2", True)),
        (r"\boxed{\frac{a}{b}} and \boxed{c}, \boxed{d}.", (r"\frac{a}{b}, c, d", True)),
        (r"\boxed{1} but \boxed{2}", ("2", True)),
        (r"\boxed{\{1, 2\}}", (r"\{1, 2\}", True)),
        ("plain", ("plain", False)),
    ],
)
def test_the_final_answer(completion: str, answer: tuple[str, bool]) -> None:
    assert math.final_answer(completion) == answer


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### "


@pytest.mark.parametrize(
    ("reference", "completion", "right"),
    [
        (GSM8K + "72", r"\boxed{72}", True),
        (GSM8K + "72", r"\boxed{24}", False),
        (GSM8K + "1,072", "So she sold 1072.", True),
        ("72 clips", r"\boxed{72}", True),
        ("72", r"\boxed{72 clips}", True),
        ("72 clips", r"\boxed{72 clips.}", True),
        ("34", r"\boxed{34 euros}", True),
        ("80 km/h", r"\boxed{80}", True),
        ("72 clips", r"\boxed{71 clips}", False),
        ("5x", r"\boxed{5}", False),
        ("2 sin x", r"\boxed{2}", False),
        ("2 theta", r"\boxed{2}", False),
    ],
)
def test_solutions_that_end_in_their_answer_and_units_in_plain_words(
    reference: str, completion: str, right: bool
) -> None:
    assert accepts(reference, completion) is right


def test_a_solution_in_words_is_no_reference() -> None:
    for reference in ("The answer is 72, as 48 + 24 = 72", GSM8K.rpartition("####")[0]):
        with pytest.raises(ValueError, match="that is a text, not an answer; name the column"):
            score(reference, r"\boxed{72}")
