"""The token ledger in the metrics: every generated token in exactly one place, and whether the sums match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmdflow.metrics.history import History

OUTSIDE_SUM = ("prompt", "observed", "reprefill", "eval", "overdraft")
"""Keys of the ledger that count other tokens than generated ones of training."""


def ledger_of(record: Mapping[str, Any]) -> dict[str, int]:
    """The `ledger/` keys of a metrics record, without the prefix."""
    return {key.removeprefix("ledger/"): int(n) for key, n in record.items() if key.startswith("ledger/")}


def ledger_places(ledger: Mapping[str, int]) -> dict[str, int]:
    """The places of generated tokens that are in use."""
    return {key: n for key, n in ledger.items() if key not in ("generated", *OUTSIDE_SUM) and n}


def ledger_gap(ledger: Mapping[str, int]) -> int:
    """Generated tokens minus the sum of their places: 0 when the books are right."""
    return ledger.get("generated", 0) - sum(ledger_places(ledger).values())


def latest_ledger(history: History) -> dict[str, int]:
    """The newest ledger of a run; empty if none was recorded."""
    candidates = [*list(history.iterations.values())[-1:], *history.samples[-1:]]
    records = [record for record in candidates if "ledger/generated" in record]
    return ledger_of(max(records, key=lambda record: record["time"])) if records else {}
