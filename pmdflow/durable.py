"""Files that a crash or a power loss leaves whole or not at all: synced, written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SYNC_THREADS = 8


def sync(path: Path | str) -> None:
    """Make a file's bytes, or a directory's names, durable.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Make a directory, and those above it that are missing; all their names are durable.

    What is there may have been made by a process that died before it synced the name, so that of `path` is always
    synced.

    Raises:
        OSError: the disk refuses.
    """
    missing = [made for made in (path, *path.parents) if not made.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)
    if not missing:
        with contextlib.suppress(PermissionError):  # then somebody else made the name
            sync(path.parent)


def sync_tree(root: Path) -> None:
    """Make every file and directory below `root`, and `root`, durable; journals group concurrent syncs."""
    tree = list(os.walk(root))
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(pool.map(sync, [os.path.join(directory, name) for directory, _, names in tree for name in names]))
        list(pool.map(sync, [directory for directory, _, _ in tree]))


def rename(aside: Path, path: Path) -> None:
    """Give what is synced already its final name, durably; `path` is replaced."""
    os.replace(aside, path)
    sync(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Replace the file `path`; whoever reads it sees the old content or the new one.

    A crash may leave what was written aside, `NAME.XXXXXXXX.tmp`: no name that somebody else's file has.

    Raises:
        OSError: the disk refuses; names the file.

    Example:
        >>> write(Path("/tmp/pmdflow-example.txt"), "whole")
        >>> Path("/tmp/pmdflow-example.txt").read_text()
        'whole'
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(aside)
        rename(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
