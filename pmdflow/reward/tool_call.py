"""Tool calls, compared with those that a task expects: the reward of ToolRL."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_BLOCKS = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_KIMI = re.compile(
    r"<\|tool_call_begin\|>\s*(?:functions\.)?([^<]*?)(?::\d+)?\s*<\|tool_call_argument_begin\|>"
    r"(.*?)(?:<\|tool_call_end\|>|$)",
    re.DOTALL,
)
_MARKERS = ("<tool_call>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>")


def score(*, raw_completion: str, metadata: Mapping[str, Any]) -> float:
    """Format, 0 or 1, plus `tool_call_score` of the calls in the completion, -3 to 3; unreadable calls are worth -3.

    Read are `<tool_call>` blocks of JSON, one call or a line a call, and the markers of Kimi K2, which are special
    tokens. The format is right if each call can be read. Text up to `</think>` is not looked at.

    Args:
        raw_completion: Generated text with special tokens.
        metadata: `tool_calls` is the list of expected calls, each with `name` and `parameters` (or `arguments`).

    Raises:
        ValueError: the metadata has no calls that can be read.

    Source: arXiv:2504.13958 sec. 3.2.
    """
    try:
        expected = [_call(call) for call in metadata["tool_calls"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"metadata['tool_calls'] is {metadata.get('tool_calls')!r:.80}: it must be a list of calls, each with name "
            "and parameters"
        ) from error
    try:
        calls = read_calls(raw_completion.rpartition("</think>")[2])
    except (ValueError, RecursionError):  # what is nested too deeply is no call either
        return -3.0
    return 1.0 + tool_call_score(expected, calls)


def tool_call_score(
    expected: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]], *, high: float = 3.0, low: float = -3.0
) -> float:
    """How well `calls` match `expected`, both of {name, parameters}: low + (high - low) S / S_max.

    S is the Jaccard index of the names as multisets, plus, over pairs of an expected and a made call of one name, the
    Jaccard index of their parameter names and the number of equal values; S_max = 1 + sum over expected calls of
    (1 + number of parameters). Calls are paired so that the sum is largest. (The released code pairs greedily, so that
    its score depends on the order of calls; where one call of a name is expected, the two are the same.)

    A superfluous call costs the names' index only.

    Source: arXiv:2504.13958 sec. 3.2.

    Example:
        >>> tool_call_score([{"name": "add", "parameters": {"a": 1}}], [{"name": "add", "parameters": {"a": 2}}])
        1.0
    """
    names, made = Counter(call["name"] for call in expected), Counter(call["name"] for call in calls)
    total = _jaccard(names, made)
    for name in names & made:
        total += _best_pairs(
            [
                [_match(want["parameters"], call["parameters"]) for call in calls if call["name"] == name]
                for want in expected
                if want["name"] == name
            ]
        )
    largest = 1.0 + sum(1 + len(call["parameters"]) for call in expected)
    return low + (high - low) * total / largest


def read_calls(text: str) -> list[dict[str, Any]]:
    """The calls in a text, in order; none if it has no marker of one.

    Raises:
        ValueError: there is a call that cannot be read.
    """
    calls = [_call({"name": name.strip(), "parameters": arguments}) for name, arguments in _KIMI.findall(text)]
    for block in _BLOCKS.findall(text):
        calls += [_call(call) for call in _read_block(block)]
    if not calls and any(marker in text for marker in _MARKERS):
        raise ValueError("a marker of a tool call without a call")
    return calls


def _read_block(block: str) -> list[Any]:
    try:
        value = json.loads(block)
    except ValueError:
        value = [json.loads(line) for line in block.strip().split("\n")]
    return value if isinstance(value, list) else [value]


def _call(value: Any) -> dict[str, Any]:
    """One call with its parameters as a mapping, which may come as JSON."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"{value!r:.80} is no call")
    parameters = value.get("parameters", value.get("arguments"))
    if isinstance(parameters, str):
        parameters = json.loads(parameters)
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{value!r:.80} has no parameters")
    return {"name": value["name"], "parameters": dict(parameters)}


def _match(expected: Mapping[str, Any], made: Mapping[str, Any]) -> float:
    equal = sum(1 for name, value in expected.items() if name in made and made[name] == value)
    return _jaccard(Counter(expected.keys()), Counter(made.keys())) + equal


def _jaccard(left: Counter[str], right: Counter[str]) -> float:
    """Of multisets; 1 for two empty ones."""
    if not left and not right:
        return 1.0
    return sum((left & right).values()) / sum((left | right).values())


def _best_pairs(scores: Sequence[Sequence[float]]) -> float:
    """The largest sum of entries, no two in one row or column: the Hungarian method, a row at a time.

    Each row is placed by a shortest augmenting path under potentials that keep every reduced cost at or above 0.
    """
    if len(scores) > len(scores[0]):
        scores = [list(column) for column in zip(*scores, strict=True)]
    rows, columns = len(scores), len(scores[0])
    row_potential, potential = [0.0] * rows, [0.0] * (columns + 1)
    row_of = [-1] * (columns + 1)
    """Row that holds a column; the last column is where a new row starts."""
    for row in range(rows):
        row_of[columns], column = row, columns
        slack, before, done = [math.inf] * columns, [columns] * columns, [False] * (columns + 1)
        while row_of[column] >= 0:
            done[column], here = True, row_of[column]
            for other in range(columns):
                cost = -scores[here][other] - row_potential[here] - potential[other]
                if not done[other] and cost < slack[other]:
                    slack[other], before[other] = cost, column
            least = min(slack[other] for other in range(columns) if not done[other])
            for other in range(columns + 1):
                if done[other]:
                    row_potential[row_of[other]] += least
                    potential[other] -= least
                elif other < columns:
                    slack[other] -= least
            column = next(other for other in range(columns) if not done[other] and slack[other] == 0.0)
        while column != columns:
            row_of[column] = row_of[before[column]]
            column = before[column]
    return math.fsum(scores[row_of[column]][column] for column in range(columns) if row_of[column] >= 0)
