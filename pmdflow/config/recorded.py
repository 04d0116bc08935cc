"""The configuration that a run directory holds, with every key under the name that it has today.

A configuration that a user writes is never read like this: there an old name is a mistake that the error explains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

RENAMED: dict[str, str] = {"store.commit_interval_s": "store.sync_interval_s"}
"""Former `section.key` to the present one; the value means the same."""


def rename_keys(data: Any) -> dict[str, str]:
    """Give the keys in a run's configuration their present names, in place; returns those that were renamed."""
    renamed = {}
    for old, new in RENAMED.items():
        section, key = old.split(".")
        present_section, present_key = new.split(".")
        values = data.get(section) if isinstance(data, dict) else None
        if isinstance(values, dict) and key in values:
            data.setdefault(present_section, {})[present_key] = values.pop(key)
            renamed[old] = new
    return renamed


def recorded_settings(run_dir: Path) -> dict[str, Any]:
    """The run's `config.yaml` as plain data, unchecked; empty if it is missing or unreadable."""
    try:
        loaded = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    rename_keys(loaded)
    return loaded if isinstance(loaded, dict) else {}


def recorded_meta(run_dir: Path) -> dict[str, Any]:
    """The run's `meta.json`; empty if it is missing or torn."""
    try:
        meta = json.loads((run_dir / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}
