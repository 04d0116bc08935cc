"""Units and definitions of the metrics, read from METRICS.md."""

from __future__ import annotations

import re
from importlib.resources import files

_ROW = re.compile(r"\|(?P<keys>[^|]+)\|(?P<unit>[^|]+)\|(?P<definition>.+)\|")
_KEY = re.compile(r"`([^`]+)`")


def definitions() -> dict[str, str]:
    """`UNIT: DEFINITION` by key, as METRICS.md has them.

    A row may name several keys: a later one without a slash has the component of the first, and one that begins with
    `_` its words as well, up to the last.

    Example:
        >>> definitions()["time/train_s"].partition(":")[0]
        's'
    """
    found: dict[str, str] = {}
    for line in files("pmdflow.metrics").joinpath("METRICS.md").read_text(encoding="utf-8").splitlines():
        match = _ROW.fullmatch(line)
        keys = _KEY.findall(match["keys"]) if match else []
        if match is None or not keys:
            continue
        component, _, first = keys[0].rpartition("/")
        stem = first.rpartition("_")[0]
        for key in keys:
            name = key if "/" in key else f"{component}/{stem + key if key.startswith('_') else key}"
            found[name] = f"{match['unit'].strip()}: {match['definition'].strip()}"
    return found
