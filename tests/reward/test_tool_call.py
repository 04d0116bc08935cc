"""Tool calls against expected ones: the reference's numbers, and what must change nothing."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.reward.tool_call import read_calls, score, tool_call_score

Call = dict[str, Any]
CALLS = st.lists(
    st.builds(
        lambda name, parameters: {"name": name, "parameters": parameters},
        st.sampled_from("fgh"),
        st.dictionaries(st.sampled_from("abc"), st.integers(0, 2), max_size=3),
    ),
    max_size=4,
)


def call(name: str, **parameters: Any) -> Call:
    return {"name": name, "parameters": parameters}


@pytest.mark.parametrize(
    ("expected", "calls", "value"),
    [
        ([call("f", a=1)], [call("f", a=1)], 3.0),
        ([], [], 3.0),
        ([], [call("f")], -3.0),
        ([call("f", a=1)], [], -3.0),
        ([call("f", a=1)], [call("g", a=1)], -3.0),
        ([call("f", a=1)], [call("f", a=1), call("g")], 2.0),
        ([call("f", a=1)], [call("f", a=2)], 1.0),
        ([call("f", a=1), call("f", a=2)], [call("f", a=2)], 0.5 * 6 / 5 + 2 * 6 / 5 - 3),
        ([call("f", a=1, b=2), call("g", c=3)], [call("f", a=1, b=2), call("g", c=3), call("h")], 3 - 1 / 3),
    ],
)
def test_scores_of_the_reference(expected: list[Call], calls: list[Call], value: float) -> None:
    assert tool_call_score(expected, calls) == pytest.approx(value, abs=1e-12)
    assert tool_call_score(expected, calls, high=1.0, low=0.0) == pytest.approx((value + 3) / 6, abs=1e-12)


@given(CALLS, CALLS, st.randoms())
def test_order_changes_nothing_and_equal_lists_are_best(expected: list[Call], calls: list[Call], random: Any) -> None:
    value = tool_call_score(expected, calls)
    shuffled = [
        {
            "name": one["name"],
            "parameters": dict(random.sample(list(one["parameters"].items()), len(one["parameters"]))),
        }
        for one in random.sample(calls, len(calls))
    ]
    assert tool_call_score(random.sample(expected, len(expected)), shuffled) == pytest.approx(value, abs=1e-12)
    assert -3.0 <= value <= tool_call_score(expected, random.sample(expected, len(expected))) == 3.0


@given(CALLS, CALLS)
def test_calls_are_paired_to_the_largest_sum(expected: list[Call], calls: list[Call]) -> None:
    """Against every pairing."""

    def match(want: Call, made: Call) -> float:
        keys, others = set(want["parameters"]), set(made["parameters"])
        jaccard = len(keys & others) / len(keys | others) if keys | others else 1.0
        return jaccard + sum(made["parameters"].get(key) == value for key, value in want["parameters"].items())

    padded = [*calls, *[None] * len(expected)]
    best = max(
        sum(match(w, m) for w, m in zip(expected, order, strict=False) if m is not None and m["name"] == w["name"])
        for order in itertools.permutations(padded, len(expected))
    )
    total = 1 + sum(1 + len(one["parameters"]) for one in expected)
    names, made = [one["name"] for one in expected], [one["name"] for one in calls]
    common = sum(min(names.count(name), made.count(name)) for name in "fgh")
    jaccard = common / (len(names) + len(made) - common) if names or made else 1.0
    assert tool_call_score(expected, calls) == pytest.approx(6 * (jaccard + best) / total - 3, abs=1e-9)


HERMES = '<think>\n<tool_call>{"name": "no"}</think><tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
LINES = '<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n{"name": "g", "parameters": {}}\n</tool_call>'
KIMI = (
    "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|>'
    "<|tool_calls_section_end|>"
)


@pytest.mark.parametrize(
    ("completion", "expected", "value"),
    [
        (HERMES, [call("f", a=1)], 4.0),
        (LINES, [call("f", a=1), call("g")], 4.0),
        (KIMI, [{"name": "f", "arguments": json.dumps({"a": 1})}, call("g")], 4.0),
        ("no call needed", [], 4.0),
        ("no call made", [call("f")], -2.0),
        ("<tool_call>{not json}</tool_call>", [call("f")], -3.0),
        ("<tool_call>" + "[" * 100_000, [call("f")], -3.0),
        ("<|tool_call_begin|>" * 5_000, [], -3.0),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [call("f")], -3.0),
        ('<tool_call>{"name": "f", "arguments": {}}', [call("f")], 4.0),
    ],
)
def test_completions_keep_their_calls(completion: str, expected: list[Call], value: float) -> None:
    assert score(raw_completion=completion, metadata={"tool_calls": expected}) == value


def test_calls_are_read_in_order() -> None:
    assert read_calls(KIMI) == [call("f", a=1), call("g")]
    assert read_calls(LINES) == [call("f", a=1), call("g")]
    with pytest.raises(ValueError, match=r"metadata\['tool_calls'\] is None"):
        score(raw_completion="", metadata={})
