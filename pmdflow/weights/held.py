"""The files of versions that this process has, and how the processes of a node find each other's."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pmdflow.errors import WeightsLost
from pmdflow.file_lock import wait_for_lock
from pmdflow.types import UInt8
from pmdflow.weights.file import WeightsFile
from pmdflow.weights.transport import Stored, WeightsHandle

KEPT_NOTES = 8
"""Versions whose notes stay in the directory of a node; a note is a line of text."""


class HeldFiles:
    """The newest versions whose file is open here; each stays as long as it is among them."""

    def __init__(self, kept: int) -> None:
        """Keep at most `kept` versions."""
        self._kept = kept
        self._files: dict[int, WeightsFile] = {}
        self._lock = threading.Lock()

    def make_room(self) -> None:
        """Let the oldest go before another comes: no more than `kept` are in memory."""
        with self._lock:
            for version in sorted(self._files)[: max(len(self._files) + 1 - self._kept, 0)]:
                del self._files[version]

    def keep(self, version: int, file: WeightsFile) -> None:
        """Have a version."""
        with self._lock:
            self._files[version] = file

    def get(self, version: int) -> WeightsFile | None:
        """The file of a version."""
        with self._lock:
            return self._files.get(version)

    def newest(self) -> tuple[int, WeightsFile] | None:
        """The newest version and its file."""
        with self._lock:
            return max(self._files.items(), key=lambda item: item[0], default=None)

    def read(self, version: int, offset: int, num_bytes: int, *, delta: bool = False) -> UInt8:
        """UInt8 of the file of a version, or of its delta; fewer at its end.

        Raises:
            WeightsLost: it is not held.
        """
        file = self.get(version)
        wanted = file.delta if delta and file is not None else file
        if wanted is None:
            what = "delta" if delta else "weights"
            raise WeightsLost(f"this process does not have the {what} of version {version} any more")
        return np.frombuffer(os.pread(wanted.descriptor, num_bytes, offset), np.uint8)


def from_stored(stored: Stored | None, handle: WeightsHandle, why: str) -> WeightsFile:
    """The file of a version that nobody has any more, made again in memory of this node.

    Raises:
        WeightsLost: it is not stored either, or as other bytes than were published; says `why` it is looked for there.
    """
    tensors = None if stored is None else stored.tensors(handle.version)
    if tensors is None:
        raise WeightsLost(f"weights of version {handle.version} are lost: {why}, and no checkpoint is of them")
    file = WeightsFile.write(tensors)
    if handle.digest not in ("", file.digest):
        raise WeightsLost(
            f"weights of version {handle.version} are lost: {why}, and the checkpoint's have the digest {file.digest}, "
            f"published was {handle.digest}"
        )
    return file


class NodeNotes:
    """Notes of which process of this node has the memory file of a version, in a directory of the node and the run.

    A note is true as long as that process lives and the file is the one noted. One process at a time makes a version's
    file; if it dies, the next one does, and if it takes too long (it may be stopped) the next one does beside it.
    """

    def __init__(self, run_dir: str, node: str) -> None:
        """Take notes of a run on a node; `node` is its name, which no other node has."""
        self.node = node
        key = hashlib.sha256(f"{run_dir}\0{node}".encode()).hexdigest()[:16]
        self._directory = Path(tempfile.gettempdir()) / f"pmdflow-{os.getuid()}" / key

    def find(self, handle: WeightsHandle) -> WeightsFile | None:
        """The file of a version, opened, if a living process of this node has it."""
        try:
            lines = self._path(handle.version).read_text().splitlines()
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            digest, _, rest = line.partition(" ")
            number, _, path = rest.partition(" ")
            if handle.digest not in ("", digest) or not number.isdigit():  # a full disk cuts lines short
                continue
            try:
                file = WeightsFile.open(path, digest)
            except OSError:
                continue
            if os.fstat(file.descriptor).st_ino == int(number):  # else the process id is another's by now
                return file
        return None

    def add(self, version: int, file: WeightsFile) -> None:
        """This process has the file of a version."""
        path = self._path(version)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("a") as notes:
            notes.write(f"{file.digest} {os.fstat(file.descriptor).st_ino} {file.path}\n")
        for old in sorted(self._directory.glob("version-*"))[: -2 * KEPT_NOTES]:
            old.unlink(missing_ok=True)

    @contextmanager
    def alone(self, version: int, *, timeout_s: float) -> Iterator[None]:
        """Be the one process of the node that makes the file of a version, or one more after `timeout_s`."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._path(version).with_suffix(".lock").open("w") as lock:
            wait_for_lock(lock, timeout_s=timeout_s)
            yield

    def _path(self, version: int) -> Path:
        return self._directory / f"version-{version:09d}"
