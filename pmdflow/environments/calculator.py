"""The worked example: a calculator. `configs/calculator.yaml` trains with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pmdflow.environments.protocol import Observation

MAX_CHARS = 256
"""Longer expressions are refused."""
_SUM = re.compile(r"\s*-?\d+(?:\s*[-+]\s*\d+)*\s*")
_TERM = re.compile(r"([-+]?)\s*(\d+)")


class Calculator:
    r"""Answers a turn that ends in `[12 + 30]` with ` = 42` and a newline, and ends the trajectory after any other.

    It keeps no state, so that a repeated call answers the same.

    Example:
        >>> Calculator().step(key="7/1", action="[12 + 30]").text
        ' = 42\n'
    """

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Say nothing."""
        return Observation()

    def step(self, *, key: str, action: str) -> Observation:
        """Compute what stands between the last brackets."""
        if not action.endswith("]"):
            return Observation(done=True)
        expression = action[:-1].rpartition("[")[2]
        if len(expression) > MAX_CHARS or not _SUM.fullmatch(expression):
            return Observation(text=" = ?\n")
        total = sum(-int(digits) if sign == "-" else int(digits) for sign, digits in _TERM.findall(expression))
        return Observation(text=f" = {total}\n")
