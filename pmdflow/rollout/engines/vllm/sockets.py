"""Where vLLM's processes meet: a folder of this process, which is removed with it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_FOLDER = "vllm-"


class Sockets:
    """A folder for the sockets of the vLLM processes that are started from now on, told by what they inherit.

    Its name is that of the process: vLLM reads it only once. What a process that was killed has left goes with the next
    one that begins on this machine.

    Example:
        >>> sockets = Sockets()
        >>> os.environ["VLLM_RPC_BASE_PATH"] == str(sockets.folder)
        True
        >>> sockets.close()
    """

    def __init__(self) -> None:
        """Make the folder."""
        parent = Path(tempfile.gettempdir()) / f"pmdflow-{os.getuid()}"
        parent.mkdir(mode=0o700, exist_ok=True)
        for left in parent.glob(f"{_FOLDER}*"):
            if not Path("/proc", left.name.removeprefix(_FOLDER)).exists():
                shutil.rmtree(left, ignore_errors=True)
        self.folder = parent / f"{_FOLDER}{os.getpid()}"
        self.folder.mkdir(exist_ok=True)
        os.environ["VLLM_RPC_BASE_PATH"] = str(self.folder)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)
