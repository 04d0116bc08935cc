"""Asynchronous RL post-training of language models by online policy mirror descent."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmdflow.library.run import Checkpoint as Checkpoint
    from pmdflow.library.run import Run as Run
    from pmdflow.library.run import open_run as open_run
    from pmdflow.library.training import up as up
    from pmdflow.library.trajectories import Group as Group
    from pmdflow.library.trajectories import Trajectory as Trajectory

_NAMES = {
    "Checkpoint": "pmdflow.library.run",
    "Group": "pmdflow.library.trajectories",
    "Run": "pmdflow.library.run",
    "Trajectory": "pmdflow.library.trajectories",
    "open_run": "pmdflow.library.run",
    "up": "pmdflow.library.training",
}
"""Where what a script uses is defined; it is imported at first use, so that `import pmdflow` stays light."""

__all__ = list(_NAMES)

# Ray reads these when it is first imported, wherever that is.
# It would start every worker through `uv run` again, in a copy of the project.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Telemetry calls may still be on their way to an actor that has been stopped on purpose.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
# Progress bars of libraries in actors would only fill the logs.
os.environ.setdefault("TQDM_DISABLE", "1")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
