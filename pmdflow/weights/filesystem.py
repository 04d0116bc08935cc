"""Weights through a shared directory: safetensors files, visible only when whole, which each node maps."""

from __future__ import annotations

import os
from pathlib import Path

from pmdflow.errors import PmdflowError, WeightsLost
from pmdflow.weights.file import NamedTensors, WeightsFile, digest_of, write_file
from pmdflow.weights.held import HeldFiles
from pmdflow.weights.transport import Bytes, WeightsHandle

KEPT_VERSIONS = 2
"""A rollout actor may still read the version before the newest."""


class FilesystemTransport:
    """Writes each version aside and renames it; older versions are removed."""

    def __init__(self, directory: Path, *, kept: int = KEPT_VERSIONS) -> None:
        """Use `directory`, which every node must see; the newest `kept` versions stay in it."""
        self._directory = directory
        self._kept = kept
        self._held = HeldFiles(1)

    def publish(self, version: int, weights: NamedTensors) -> WeightsHandle:
        """Write `version-NNNNNN.safetensors`; the rename makes it visible."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"version-{version:06d}.safetensors"
        aside = path.with_suffix(".tmp")
        with aside.open("wb", buffering=0) as file:
            digest = write_file(file.fileno(), weights)
        os.replace(aside, path)  # a version need not survive a power loss: it is published anew at a resume
        for old in sorted(self._directory.glob("version-*.safetensors"))[: -self._kept]:
            old.unlink(missing_ok=True)
        return WeightsHandle(version=version, location=str(path), digest=digest)

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> WeightsFile:
        """Map the file of a handle."""
        try:
            file = WeightsFile.open(handle.location, handle.digest)
        except FileNotFoundError as error:
            raise WeightsLost(f"weights of version {handle.version} are gone from {handle.location}") from error
        found = digest_of(file.descriptor)
        if found != handle.digest:
            raise PmdflowError(
                f"{handle.location} has the digest {found}, published was {handle.digest}: this node reads another "
                "file than the learner wrote"
            )
        self._held.make_room()
        self._held.keep(handle.version, file)
        return file

    def read(self, version: int, offset: int, num_bytes: int) -> Bytes:
        """Bytes of the version that was fetched last."""
        return self._held.read(version, offset, num_bytes)
