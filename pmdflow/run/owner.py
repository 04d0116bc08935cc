"""Who holds a run directory: a process of this machine, or of another one that shares the disk."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owner:
    """The `up` that holds the lock of a run directory."""

    pid: int
    place: str
    """Host and process namespace that `pid` counts in; empty where an earlier release wrote the lock."""

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        space = Path("/proc/self/ns/pid")
        return cls(os.getpid(), f"{platform.node()} {os.readlink(space) if space.exists() else ''}".strip())

    @classmethod
    def of(cls, text: str) -> Owner | None:
        """What `text` of the lock says; None if that is nothing yet."""
        pid, _, place = text.strip().partition(" ")
        return cls(int(pid), place) if pid.isdecimal() else None

    @property
    def is_here(self) -> bool:
        """Whether `pid` is a process that this one sees under the same number."""
        return self.place == Owner.me().place

    def __str__(self) -> str:
        """`PID PLACE`, as in the lock."""
        return f"{self.pid} {self.place}"
