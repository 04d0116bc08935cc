r"""Mathematical answers, compared with a reference by math-verify.

An answer is hostile as soon as it is trained for: `9^{9^{9^{9}}}` or ten thousand brackets keep a computer algebra
system busy for ever, in code that no signal interrupts. So each comparison runs in a forked child with a limit of time
and memory, and what exceeds it is the answer's fault, not the machine's.

What math-verify does and an examiner would not: decimals count as equal from six places on (0.333333 for 1/3); degrees
and units are dropped without a look at which; of several answers without a box one counts.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import select
import signal
from collections.abc import Mapping
from typing import Any, Literal

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from pmdflow.reward.rubric import InvalidCompletion

LIMIT_S = 5.0
"""Longest comparison; less where `reward.timeout_s` is shorter."""
MEMORY_BYTES = 1 << 30
"""What a comparison may allocate."""
MAX_CHARS = 2000
"""A longer answer in a box is refused; without a box, so much of the text's end is read."""

MOST_WORDS = 3
"""With more of them beside a number, and no LaTeX, a reference is a whole solution: its words would be variables."""

_INTEGER = re.compile(r"-?\d{1,18}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(\w+))")
_BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:and|or)?[\s$,;]*")
_FONT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*(?=\{)|[{}$*\s]")
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOSEN = {True: re.compile(r"\(?([A-J])(?![A-Za-z])"), False: re.compile(r".*(?<![A-Za-z])([A-J])\)?\W*", re.DOTALL)}
_PERCENT = re.compile(r"(?:\s|\\[,; ])*(?:\\?%|percent|pct)[\s.]*$")
_WORD, _DIGIT = re.compile(r"[A-Za-z]{2,}"), re.compile(r"\d")
_UNIT = re.compile(
    r"(-?\\?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?)\s+"
    r"(?!(?:arc|sinh?|cosh?|tanh?|cot|sec|csc|log|exp|sqrt|mod|alpha|beta|gamma|delta|theta|lambda|omega)\b)"
    r"([A-Za-z]{3,}(?:[ /-][A-Za-z]{3,})*|[A-Za-z]+/[A-Za-z]+)\.?"
)
"""A number and words behind it, which would be read as variables."""
_DIGIT_SPACE = re.compile(r"(?<=\d)(?:\\[,!:; ]|~)(?=\d{3})")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d{1,50})\}")


def score(*, completion: str, metadata: Mapping[str, Any], timeout_s: float) -> float:
    """1.0 if the final answer equals `metadata["answer"]`, else 0.0.

    The final answer is what stands in the last box; without a box, what the text ends with. Text up to `</think>` is
    not looked at. Values are compared, not forms: 1/2 is 0.5, a set has any order, a unit may be left out, and 50 %
    is 50 as well as 1/2. A reference of one letter from A to J is a choice, and the answer must choose it.

    Args:
        completion: Generated text.
        metadata: `answer` is the reference: a number, or text with or without LaTeX; of a solution that ends in
            `#### 72`, as those of GSM8K do, what stands there.
        timeout_s: Time that scoring may take.

    Raises:
        InvalidCompletion: there is no answer, or none that can be compared within `LIMIT_S` and `MEMORY_BYTES`.
        ValueError: there is no reference, or none that can be read, such as a whole solution in words.
    """
    if metadata.get("answer") is None:
        raise ValueError("metadata lacks 'answer': pmdflow.reward.math compares with it; name the column so")
    reference = str(metadata["answer"]).rpartition("####")[2].strip()
    answer, is_boxed = final_answer(completion)
    if answer == reference:
        return 1.0
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return float(int(answer) == int(reference))
    choice = _CHOICE.fullmatch(_FONT.sub("", reference))
    if choice:
        chosen = _CHOSEN[is_boxed].match(_FONT.sub("" if is_boxed else " ", answer))
        return float(chosen is not None and chosen[1] == choice[1])
    if "\\" not in reference and _DIGIT.search(reference) and len(_WORD.findall(reference)) > MOST_WORDS:
        raise ValueError(
            f"metadata['answer'] is {reference!r:.80}: that is a text, not an answer; name the column with the answer "
            "alone"
        )
    limit_s = min(LIMIT_S, timeout_s / 2)
    end = _in_child(reference, answer, is_boxed, limit_s=limit_s)
    if end == "no reference":
        raise ValueError(f"metadata['answer'] is {reference!r:.80}: it cannot be read within {limit_s:g} s")
    if end == "no answer":
        raise InvalidCompletion(f"the answer {answer!r:.80} cannot be compared within {limit_s:g} s")
    return 1.0 if end == "equal" else 0.0


def final_answer(completion: str) -> tuple[str, bool]:
    r"""The answer, and whether it was in a box. Boxes with nothing but a comma, `and` or `or` between are one answer.

    Raises:
        InvalidCompletion: no text, an empty box, or a box that is longer than `MAX_CHARS` or not closed.

    Example:
        >>> final_answer(r"x is \boxed{1} or \boxed{2}.")
        ('1, 2', True)
    """
    text = completion.rpartition("</think>")[2].strip()
    if not text:
        raise InvalidCompletion("there is no answer")
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return text[-MAX_CHARS:], False
    parts = [_read_box(text, boxes[-1])[1]]
    for box, following in zip(boxes[-2::-1], boxes[::-1], strict=False):
        end, content = _read_box(text, box)
        if end > following.start() or not _BETWEEN_BOXES.fullmatch(text, end, following.start()):
            break
        parts.insert(0, content)
    answer = ", ".join(part.strip().rstrip(".") for part in parts)
    if not answer or len(answer) > MAX_CHARS:
        raise InvalidCompletion(f"the box holds no text, more than {MAX_CHARS} characters, or is not closed")
    return answer, True


def _read_box(text: str, match: re.Match[str]) -> tuple[int, str]:
    r"""Where a box ends, and what it holds; of `\boxed 42` the word. Nothing if it is too long or not closed."""
    if match[1]:
        return match.end(), match[1]
    depth = 1
    for index in range(match.end(), min(match.end() + MAX_CHARS + 1, len(text))):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index + 1, text[match.end() : index]
    return len(text), ""


def _in_child(
    reference: str, answer: str, is_boxed: bool, *, limit_s: float
) -> Literal["equal", "different", "no reference", "no answer"]:
    """Compare in a forked process, which is killed after `limit_s`; says what it could not deal with."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _limit_memory()
            expected = _values(reference, is_boxed=True, other=answer)
            os.write(writer, b"r")
            given = _values(answer, is_boxed=is_boxed, other=reference)
            os.write(writer, b"=" if _is_equal(expected, given) else b"/")
        finally:
            os._exit(0)
    os.close(writer)
    said = b""
    try:
        while select.select([reader], [], [], limit_s)[0] and (byte := os.read(reader, 1)):
            said += byte
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
    if not said:
        return "no reference"
    return "equal" if said == b"r=" else "different" if said == b"r/" else "no answer"


def _is_equal(expected: list[Any], given: list[Any]) -> bool:
    return bool(verify(expected, given, allow_set_relation_comp=True, timeout_seconds=None))


def _values(text: str, *, is_boxed: bool, other: str) -> list[Any]:
    """What `text` may mean: the number before a percent sign, and unless `other` has a sign too, its hundredth."""
    number, is_percentage = _PERCENT.subn("", text)
    values = _parse(number, is_boxed=is_boxed)
    if is_percentage and not _PERCENT.search(other):
        values += [value / 100 for value in values if getattr(value, "is_number", False)]
    return values


def _parse(text: str, *, is_boxed: bool) -> list[Any]:
    text = _DIGIT_SPACE.sub("", text).replace(r"\varnothing", r"\emptyset")
    text = _REPEATING.sub(_as_fraction, text)
    if unit := _UNIT.fullmatch(text.strip()):
        text = rf"{unit[1]}\text{{ {unit[2]}}}"
    if is_boxed:
        return list(parse(rf"\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None))
    return list(parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None))


def _as_fraction(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as (16 - 1) / 90."""
    whole, first, repeated = match[1] or "0", match[2], match[3]
    nines = (10 ** len(repeated) - 1) * 10 ** len(first)
    return rf"\frac{{{int(whole + first + repeated) - int(whole + first)}}}{{{nines}}}"


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))


logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
# Grammar tables and parts of SymPy are loaded at first use: here once, not in each child.
_is_equal(_parse(r"(x+1)^2", is_boxed=True), _parse(r"x^2+2x+\frac{2}{2}", is_boxed=True))
_is_equal(_parse(r"[1, \sqrt{2})", is_boxed=True), _parse("the answer is 3/4", is_boxed=False))
