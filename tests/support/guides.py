"""The commands and snippets of a guide, so that a test can run each."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_COMMAND = re.compile(r"^    (?:pip install uv && )?(?:uv run (?:--extra \S+ )?)?(pmdflow .*)$", re.MULTILINE)
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One thing that a reader would run."""

    language: str
    """`python`, `yaml`, or `command`."""
    text: str

    @property
    def arguments(self) -> list[str]:
        """Words of a command after the program."""
        return shlex.split(self.text, comments=True)[1:]


def steps(guide: Path) -> list[Step]:
    """Fenced blocks and indented `pmdflow` commands, in order; what stands before `pmdflow` is left out."""
    text = guide.read_text(encoding="utf-8").replace("\\\n", "")  # a command may go on in the next line
    found = [(match.start(), Step(match[1], match[2])) for match in _FENCE.finditer(text)]
    found += [(match.start(), Step("command", match[1])) for match in _COMMAND.finditer(text)]
    return [step for _, step in sorted(found, key=lambda pair: pair[0])]
