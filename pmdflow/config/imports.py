"""Import paths of a configuration: `package.module:name`, and in which folder the module was found."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMPORT_PATH = r"^(/[^:]*:)?[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""As it is written; a run records before it, and a colon, the folder that holds the module."""


def locate(path: str, folders: Sequence[Path]) -> str:
    """The import path with the first of `folders` that holds its module; as it is where none does.

    What comes with Python or with pmdflow is nowhere else.

    Example:
        >>> locate("math:sqrt", [Path("/srv/job")])
        'math:sqrt'
    """
    folder, module, _ = parts(path)
    top = module.partition(".")[0]
    if folder or top == "pmdflow" or top in sys.stdlib_module_names:
        return path
    for held in folders:
        if (held / f"{top}.py").is_file() or (held / top).is_dir():
            return f"{held.absolute()}:{path}"
    return path


def shown(path: str) -> str:
    """The import path as it was written, for messages."""
    return ":".join(parts(path)[1:])


def parts(path: str) -> tuple[str, str, str]:
    """Folder (empty without one), module and name.

    Example:
        >>> parts("/srv/job:own.rewards:score")
        ('/srv/job', 'own.rewards', 'score')
    """
    rest, _, name = path.rpartition(":")
    folder, _, module = rest.rpartition(":")
    return folder, module, name


def load_named(path: str) -> Any:
    """Import a module and look up what the path names.

    Raises:
        AttributeError: the module has no such name.
        Exception: whatever importing the module raises.
    """
    _, _, name = parts(path)
    return getattr(load_module(path), name)


def load_module(path: str) -> Any:
    """Import the module of a path; its folder is then searched first, for what the module itself imports too.

    Raises:
        Exception: whatever importing it raises.
    """
    folder, module, _ = parts(path)
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(module)
