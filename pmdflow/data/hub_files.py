"""Which files of a Hub data set are one split: by its card's `configs`, else by how files and folders are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import yaml

from pmdflow.config.sources import FILE_SUFFIXES

CONVERTED = "@refs/convert/parquet"
"""The Hub's own conversion of a data set whose files are of another format."""


def choose_files(names: Sequence[str], *, card: str, config: str | None, split: str) -> list[str]:
    """The files of `split`, in order, all `.parquet` or all `.jsonl`.

    Args:
        names: Every file of the repository.
        card: Text of its README.md, which may begin with YAML that has `configs`.
        config: Configuration; None takes the only or the default one.
        split: Split.

    Raises:
        ValueError: no such configuration or split, or none in a format that is read; says what there is.

    Example:
        >>> choose_files(["main/train-0.parquet", "main/test-0.parquet"], card="", config=None, split="test")
        ['main/test-0.parquet']
    """
    readable = sorted(name for name in names if name.endswith(FILE_SUFFIXES))
    if not readable:
        raise ValueError(
            f"it has no .parquet or .jsonl file; name the Hub's conversion with {CONVERTED}, or download it yourself"
        )
    described = _configs(card)
    if described:
        patterns = _patterns(_chosen(described, config), split)
        chosen = [name for name in readable if any(fnmatch(name, pattern) for pattern in patterns)]
    else:
        chosen = _of_configuration([name for name in readable if _is_of(name, split)], config, split)
    suffix = PurePosixPath(chosen[0]).suffix if chosen else ""
    if not chosen or any(not name.endswith(suffix) for name in chosen):
        what = f"split {split!r} is in files of two formats" if chosen else f"there is no split {split!r}"
        raise ValueError(
            f"{what} among {_some(readable)}; set data.split or data.config, or name the Hub's conversion with "
            f"{CONVERTED}"
        )
    return chosen


def _configs(card: str) -> dict[str, Mapping[str, Any]]:
    """What the card says of each configuration's files."""
    match = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}  # the card is for people first: the names still say which files are meant
    given = values.get("configs") if isinstance(values, dict) else None
    return {str(item["config_name"]): item for item in given or () if item.get("data_files")}


def _chosen(described: Mapping[str, Mapping[str, Any]], config: str | None) -> Mapping[str, Any]:
    if config is None:
        defaults = [name for name, item in described.items() if item.get("default") or name == "default"]
        config = next(iter(described)) if len(described) == 1 else next(iter(defaults), None)
    if config is None or config not in described:
        asked = "none is the default" if config is None else f"there is no configuration {config!r}"
        raise ValueError(f"{asked}; set data.config to one of {_some(described)}")
    return described[config]


def _patterns(item: Mapping[str, Any], split: str) -> list[str]:
    """Patterns of a split: files without one are `train`."""
    given = item["data_files"]
    parts = given if isinstance(given, list) else [given]
    found = []
    for part in parts:
        named = part if isinstance(part, Mapping) else {"split": "train", "path": part}
        if str(named["split"]) == split:
            paths = named["path"]
            found += paths if isinstance(paths, list) else [paths]
    return [str(PurePosixPath(str(item.get("data_dir") or "")) / str(path)) for path in found]


def _of_configuration(names: Sequence[str], config: str | None, split: str) -> list[str]:
    """Those in the folder of a configuration; where none is asked for, they must lie together."""
    folders = {name: [part for part in _folders(name) if part not in (split, f"partial-{split}")] for name in names}
    homes = sorted({"/".join(folder) for folder in folders.values()})
    if config is None and len(homes) > 1:
        config = "default" if "default" in homes else None
        if config is None:
            raise ValueError(f"it has several configurations; set data.config to one of {_some(homes)}")
    return [name for name, folder in folders.items() if config is None or config in folder]


def _folders(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts[:-1]


def _is_of(name: str, split: str) -> bool:
    """Whether a file's name begins with the split, or a folder is called after it."""
    path = PurePosixPath(name)
    return bool(
        re.match(rf"{re.escape(split)}(?![a-zA-Z])", path.name)
        or {split, f"partial-{split}"} & {*_folders(name)}
        or re.search(rf"[-_.]{re.escape(split)}$", path.stem)
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
