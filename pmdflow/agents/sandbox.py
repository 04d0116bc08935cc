"""The walls around an agent program: it reads Python's packages, writes its own `/tmp`, and reaches the gateway alone.

What confines it is what confines programs of code rewards; of the network it has a loopback of its own, in which one
port is answered by its keeper, outside, for the gateway.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pmdflow.reward.confinement import PYTHON, Opening, confinements
from pmdflow.reward.sandbox import ENTRY, Limits, find_sandbox

PORT = 8000
"""Of the gateway, inside."""
ADDRESS = f"http://127.0.0.1:{PORT}"
_REWARD = "/tmp/reward.json"  # noqa: S108 - that of the inside
_DISK_BYTES = 256 << 20
_LIMITS = Limits(memory_bytes=4 << 30, processes=64, open_files=256, disk_bytes=_DISK_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Walls:
    """Around every program of a run."""

    way: str
    """Name of the confinement, which holds on this machine."""
    gateway: tuple[str, int]
    run_dir: Path

    @classmethod
    def find(cls, gateway: str, run_dir: Path) -> Walls:
        """Those that hold here; `gateway` is `http://HOST:PORT`.

        Raises:
            SandboxFailed: none do.
        """
        url = urlsplit(gateway)
        assert url.hostname is not None
        assert url.port is not None
        return cls(way=find_sandbox().confinement.name, gateway=(url.hostname, url.port), run_dir=run_dir.resolve())

    def job(
        self, argv: Sequence[str], *, env: Mapping[str, str], reward: Path, timeout_s: float, path: Sequence[str]
    ) -> dict[str, Any]:
        """What the keeper of one program is told besides.

        Args:
            argv: The program and its arguments; files that they name are read.
            env: All of its variables.
            reward: The file outside that its reward file is.
            timeout_s: Its deadline.
            path: Where Python finds modules.
        """
        words = [_real(word) for word in argv]
        read = (*map(Path, path), Path(sys.prefix), *(Path(word) for word in words if os.path.isabs(word)))
        runs = self.run_dir.parent
        hide = (self.run_dir if any(folder.resolve().is_relative_to(runs) for folder in read) else runs,)
        opening = Opening(read=read, hide=hide, write=((reward, _REWARD),), loopback=True)
        ways = confinements(disk_bytes=_DISK_BYTES, opening=opening)
        way = next(way for way in ways if way.name == self.way)
        inside = {
            "argv": words,
            "files": {},
            "limits": asdict(_LIMITS) | {"cpu_s": math.ceil(timeout_s) + 1},
            "env": {
                "PATH": os.pathsep.join([f"{sys.prefix}/bin", os.path.dirname(PYTHON), "/usr/bin", "/bin"]),
                "PYTHONPATH": os.pathsep.join(map(os.path.realpath, path)),
                "PMDFLOW_REWARD_FILE": _REWARD,
                **env,
            },
            "port": PORT,
        }
        walls = {"job": json.dumps(inside), "gateway": list(self.gateway), "user": bool(way.user)}
        return {"argv": [*way.argv, PYTHON, "-I", "-S", "-c", ENTRY], "walls": walls}


def _real(word: str) -> str:
    """A file that a command names, by the name that it has inside; those of this Python keep their own."""
    kept = not os.path.isabs(word) or not os.path.exists(word) or Path(word).is_relative_to(sys.prefix)
    return word if kept else os.path.realpath(word)
