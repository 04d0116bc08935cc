"""`pmdflow init`: a configuration to begin with, and what it needs, in a folder of one's own.

What is written is kept in `configs/`: `templates` is a link to it in the repository, and in a wheel the folder itself.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pmdflow import durable
from pmdflow.errors import LaunchError

TEMPLATES = Path(__file__).parent / "templates"
SCHEMA = "schema.json"
"""Completion and help for editors, which the first line of every configuration names."""

TemplateName: TypeAlias = Literal["quickstart", "math", "tool", "gpu", "cluster", "k15"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What a new folder gets."""

    config: str
    """The configuration."""
    needs: tuple[str, ...] = ()
    """Files and folders of `configs/` that it names; they are laid beside it."""
    then: str
    """What to change before it runs."""


_READY = "it runs as it is, on two CPU cores and without a network"
_OWN = ("problems.jsonl", "own_reward.py")

BY_NAME: dict[TemplateName, Template] = {
    "quickstart": Template(config="quickstart.yaml", needs=("tiny-arithmetic",), then=_READY),
    "k15": Template(config="k15.yaml", needs=("tiny-arithmetic",), then=_READY),
    "tool": Template(config="calculator.yaml", needs=("tiny-calculator",), then=_READY),
    "math": Template(
        config="math.yaml",
        needs=_OWN,
        then="for your own problems and reward: task: problems.jsonl, function: own_reward:score",
    ),
    "gpu": Template(config="gpu.yaml", needs=_OWN, then="choose model.path and data.task"),
    "cluster": Template(config="cluster.yaml", needs=_OWN, then="choose run.dir (a shared folder) and model.path"),
}


def init(directory: Path, template: TemplateName) -> int:
    """Write a template; files that are there already with the same content are left as they are.

    Raises:
        LaunchError: a file would be overwritten (then nothing is written), or the folder cannot be written.
    """
    chosen = BY_NAME[template]
    files = dict(_files((chosen.config, *chosen.needs, SCHEMA)))
    try:
        other = [name for name, content in files.items() if _differs(directory / name, content)]
        if other:
            raise LaunchError(
                f"{directory} has {', '.join(other)} already, with other content; nothing was written",
                hint=f"move that away, or choose another folder: `pmdflow init NEW --template {template}`",
            )
        for name, content in files.items():
            if not (directory / name).exists():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                durable.write(directory / name, content)
    except OSError as error:
        raise LaunchError(
            f"cannot write {error.filename or directory}: {error.strerror}", hint="choose another folder"
        ) from error
    sys.stdout.write(_report(directory, chosen))
    return 0


def _files(names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Name in the new folder and content of everything below the named files and folders."""
    found = []
    for name in names:
        source = TEMPLATES / name
        below = sorted(source.rglob("*")) if source.is_dir() else [source]
        found += [(str(path.relative_to(source.parent)), path.read_bytes()) for path in below if path.is_file()]
    return found


def _differs(path: Path, content: bytes) -> bool:
    return os.path.lexists(path) and not (path.is_file() and path.read_bytes() == content)


def _report(directory: Path, chosen: Template) -> str:
    into = ["cd", *(["--"] if str(directory).startswith("-") else []), str(directory)]
    here = "" if directory == Path() else f"{shlex.join(into)} && "
    needs = [Path(name).name for name in chosen.needs]
    written = ", ".join([chosen.config, *needs, SCHEMA])
    return (
        f"wrote {written}\n{chosen.then}\n\n    {here}pmdflow up {chosen.config} --dry-run\n"
        f"    {here}pmdflow up {chosen.config}\n"
    )
