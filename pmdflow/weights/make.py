"""The transport of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pmdflow.weights.transport import Stored, Transport

if TYPE_CHECKING:
    from pmdflow.config.schema import Config


def make_transport(config: Config, run_dir: Path, *, stored: Stored | None = None) -> Transport:
    """The transport that `weights.transport` names; what nobody has any more may be in `stored`."""
    if config.weights.transport == "filesystem":
        from pmdflow.weights.filesystem import FilesystemTransport

        # One of them is being written while as many as may be live are read.
        return FilesystemTransport(run_dir / "weights", kept=(config.scheduler.versions or 1) + 1, stored=stored)
    from pmdflow.weights.object_store import ObjectStoreTransport

    kept, delta = config.scheduler.versions or 1, config.weights.delta
    return ObjectStoreTransport(str(run_dir), kept=kept, delta=delta, stored=stored)
