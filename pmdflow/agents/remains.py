"""What a program leaves: its reward in a file, and, where it killed its keeper, processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
from pathlib import Path

from pmdflow.agents.requests import RequestRefused, parse_reward

MAX_REWARD_BYTES = 1 << 16
_SWEEPS = 20
"""A process may start another one while it is looked for."""


def take_reward(path: Path) -> dict[str, float]:
    """The rewards in a file, which is removed; {} if there is none, or nothing in it.

    Raises:
        ValueError: it has none, or is no file.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # a pipe is not waited for
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ValueError("its reward file is no file")
            data = os.read(file, MAX_REWARD_BYTES + 1)
        finally:
            os.close(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"its reward file: {error.strerror}") from error
    finally:
        _remove(path)
        _remove(path.with_suffix(".part"))
    if len(data) > MAX_REWARD_BYTES:
        raise ValueError(f"its reward file has more than {MAX_REWARD_BYTES} bytes")
    try:
        return dict(parse_reward(json.loads(data)).rewards) if data else {}
    except RequestRefused as error:
        raise ValueError(f"its reward file: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its reward file is no JSON: {error}") from error


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def kill_marked(variable: str) -> None:
    """Kill the processes that have `NAME=value` in the environment with which they were started."""
    wanted = variable.encode()
    for _ in range(_SWEEPS):
        found = [pid for pid in _processes() if wanted in _environment(pid)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
