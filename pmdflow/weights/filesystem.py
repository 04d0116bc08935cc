"""Weights through a shared directory: safetensors files, visible only when whole, which each node maps."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from pmdflow.errors import WeightsDamaged
from pmdflow.types import UInt8
from pmdflow.weights.blocks import digest_of
from pmdflow.weights.file import NamedTensors, WeightsFile, write_file
from pmdflow.weights.held import HeldFiles, from_stored
from pmdflow.weights.shares import ALONE, Ranks
from pmdflow.weights.transport import Stored, WeightsHandle

KEPT_VERSIONS = 2
"""A rollout actor may still read the version before the newest."""


class FilesystemTransport:
    """Writes each version aside and renames it; older versions are removed."""

    def __init__(self, directory: Path, *, kept: int = KEPT_VERSIONS, stored: Stored | None = None) -> None:
        """Use `directory`, which every node must see; the newest `kept` versions stay in it, others may be `stored`."""
        self._directory = directory
        self._stored = stored
        self._kept = kept
        self._held = HeldFiles(1)
        self.received: Counter[str] = Counter()

    def publish(self, version: int, weights: NamedTensors, ranks: Ranks = ALONE) -> WeightsHandle:
        """Write `version-NNNNNN.safetensors` at rank 0; the rename makes it visible."""

        def write() -> WeightsHandle | None:
            try:
                return self._written(version, weights) if ranks.rank == 0 else None
            finally:
                weights.skip()

        handle = ranks.agree(write)[0]
        assert handle is not None
        return handle

    def _written(self, version: int, weights: NamedTensors) -> WeightsHandle:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"version-{version:06d}.safetensors"
        aside = path.with_suffix(".tmp")
        try:
            with aside.open("wb", buffering=0) as file:
                digest = write_file(file.fileno(), weights)
        except BaseException:
            aside.unlink()  # else what has filled the disk would keep it full
            raise
        os.replace(aside, path)  # a version need not survive a power loss: it is published anew at a resume
        for old in sorted(self._directory.glob("version-*.safetensors"))[: -self._kept]:
            old.unlink(missing_ok=True)
        return WeightsHandle(version=version, location=str(path), digest=digest)

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> WeightsFile:
        """Map the file of a handle; one that is gone from the directory comes out of a checkpoint, into memory."""
        location = handle.location or self._directory / f"version-{handle.version:06d}.safetensors"
        try:
            file = WeightsFile.open(location, handle.digest)
        except FileNotFoundError:
            file = from_stored(self._stored, handle, f"they are gone from {location}")
        found = digest_of(file.descriptor)
        if handle.digest not in ("", found):
            raise WeightsDamaged(
                f"{location} has the digest {found}, published was {handle.digest}: this node reads another "
                "file than the learner wrote"
            )
        self.received["fetched_bytes"] += os.fstat(file.descriptor).st_size
        self._held.make_room()
        self._held.keep(handle.version, file)
        return file

    def read(self, version: int, offset: int, num_bytes: int, *, delta: bool = False) -> UInt8:
        """UInt8 of the version that was fetched last."""
        return self._held.read(version, offset, num_bytes, delta=delta)
