"""Infra failures in a row: where every scoring fails, more of them will not cure it."""

from __future__ import annotations

from collections import defaultdict

from pmdflow.errors import PmdflowError
from pmdflow.reward.rubric import Scored


class FailuresInARow:
    """Counts the failures of each rubric since its last other outcome: one that works must not hide one that does not.

    Example:
        >>> FailuresInARow(most=2).count("", Scored(outcome="scored", reward=1.0))
    """

    def __init__(self, *, most: int) -> None:
        """`most` is `reward.max_failures_in_a_row`."""
        self._most = most
        self._messages: defaultdict[str, list[str]] = defaultdict(list)

    def count(self, source: str, scored: Scored) -> None:
        """Take an outcome of the rubric of `source`; "" is the one of `reward.functions`.

        Raises:
            PmdflowError: it is one infra failure too many.
        """
        messages = self._messages[source]
        if scored.outcome != "infra_failure":
            messages.clear()
            return
        messages.append(scored.message)
        if len(messages) >= self._most:
            of = f" of {source}" if source else ""
            raise PmdflowError(
                f"{len(messages)} scorings{of} in a row failed (reward.max_failures_in_a_row); the first: "
                f"{messages[0]}; the last: {messages[-1]}",
                hint="mend what the reward functions name; scores that are stored stay",
            )
