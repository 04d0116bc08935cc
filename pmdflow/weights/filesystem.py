"""Weights through a shared directory: safetensors files, visible only when whole."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from pmdflow.errors import WeightsLost
from pmdflow.weights.transport import Weights, WeightsHandle

KEPT_VERSIONS = 2
"""A rollout actor may still read the version before the newest."""


class FilesystemTransport:
    """Writes each version aside and renames it; older versions are removed."""

    def __init__(self, directory: Path, *, kept: int = KEPT_VERSIONS) -> None:
        """Use `directory`, which every node must see; the newest `kept` versions stay in it."""
        self._directory = directory
        self._kept = kept

    def publish(self, version: int, weights: Weights) -> WeightsHandle:
        """Write `version-NNNNNN.safetensors`; the rename makes it visible."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"version-{version:06d}.safetensors"
        aside = path.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside)
        os.replace(aside, path)  # a version need not survive a power loss: it is published anew at a resume
        for old in sorted(self._directory.glob("version-*.safetensors"))[: -self._kept]:
            old.unlink(missing_ok=True)
        return WeightsHandle(version=version, location=str(path))

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> Weights:
        """Read the file of a handle."""
        try:
            return load_file(handle.location)
        except FileNotFoundError as error:
            raise WeightsLost(f"weights of version {handle.version} are gone from {handle.location}") from error
