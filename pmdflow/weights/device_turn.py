"""Whose turn it is with the memory of a device, where an engine and a learner rank share one (`cluster.colocate`)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO

import ray

from pmdflow.errors import WaitTimeout
from pmdflow.file_lock import wait_for_lock


class DeviceTurn:
    """The right to fill the memory of a device of this node; one process has it, and whoever dies gives it back.

    Example:
        >>> turn = DeviceTurn("runs/one", "cpu-0")
        >>> turn.take(timeout_s=1.0)
        >>> turn.give()
    """

    def __init__(self, run_dir: str, device: str) -> None:
        """Not held yet; `device` names it among those of the node."""
        key = hashlib.sha256(f"{Path(run_dir).resolve()}\0{device}".encode()).hexdigest()[:16]
        self._path = Path(tempfile.gettempdir()) / f"pmdflow-{os.getuid()}" / f"turn-{key}"
        self._device = device
        self._lock: IO[str] | None = None

    @classmethod
    def own(cls, run_dir: str, index: int) -> DeviceTurn:
        """Of the GPU that Ray gave to this actor; without one, of processors that an engine and a rank share.

        Args:
            run_dir: The run's.
            index: Numbers the engine, or the rank.
        """
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return cls(run_dir, f"GPU {'-'.join(gpus)}" if gpus else f"processor {index}")

    def take(self, *, timeout_s: float) -> None:
        """Wait until nobody else has it; at once if it is held here.

        Raises:
            WaitTimeout: another process had it for `timeout_s`.
        """
        if self._lock is not None:
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._path.open("w")
        if not wait_for_lock(lock, timeout_s=timeout_s):
            lock.close()
            raise WaitTimeout(
                f"another process had the memory of {self._device} for {timeout_s:g} s (cluster.colocate): "
                "an engine and a learner rank take turns"
            )
        self._lock = lock

    def give(self) -> None:
        """Let the next one have it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()
