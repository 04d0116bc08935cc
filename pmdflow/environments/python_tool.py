"""A Python interpreter as a tool, in the sandbox of the code reward. `configs/python_tool.yaml` trains with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pmdflow.environments.protocol import Observation, PastTurn
from pmdflow.reward.attendance import Ended
from pmdflow.reward.confinement import PYTHON, UNCONFINED
from pmdflow.reward.sandbox import Limits, Sandbox, find_sandbox

BEGIN, END = "<python>", "</python>"
_MAIN = "main.py"


class PythonTool:
    r"""Runs what stands between `<python>` and `</python>` at the end of a turn; any other turn ends the trajectory.

    `rollout.stop: ["</python>"]` ends a turn. Each program runs alone, in a sandbox of its own that ends with it and
    takes with it every process that the program has started. So there is no state, and nothing is run again for a
    trajectory that is continued. Metrics: `python_calls` and, of those, `python_failures`.

    Example:
        >>> PythonTool().step(key="7/1", action="Let me see. <python>print(6 * 7)</python>").text  # doctest: +SKIP
        '\n<output>\n42\n</output>\n'
    """

    def __init__(
        self,
        time_limit_s: float = 4.0,
        memory_mib: int = 512,
        max_chars: int = 1000,
        sandbox: Literal["required", "none"] = "required",
    ) -> None:
        """Find a sandbox.

        Args:
            time_limit_s: Wall-clock limit of a program; `environment.timeout_s` must leave time to start and end one.
            memory_mib: Memory of each of its processes.
            max_chars: Of what it says, the last are kept.
            sandbox: `none` runs programs with limits but without walls, where every program is trusted.

        Raises:
            SandboxFailed: this machine cannot confine programs.
        """
        self._sandbox = Sandbox(confinement=UNCONFINED) if sandbox == "none" else find_sandbox()
        self._limits = Limits(wall_s=time_limit_s, cpu_s=max(round(time_limit_s), 1), memory_bytes=memory_mib << 20)
        self._max_chars = max_chars

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Say nothing."""
        return Observation()

    def step(self, *, key: str, action: str) -> Observation:
        """Run a program to its end or to a limit.

        Raises:
            SandboxFailed: it was not reached.
        """
        _, begin, program = action.rstrip().removesuffix(END).rpartition(BEGIN)
        if not begin or not action.rstrip().endswith(END):
            return Observation(done=True)
        ended = self._sandbox.run([PYTHON, "-I", "-B", _MAIN], files={_MAIN: program}, limits=self._limits)
        failed = ended.how != "exit" or ended.status != 0
        return Observation(
            text=f"\n<output>\n{self._said(ended)}\n</output>\n",
            metrics={"python_calls": 1.0, "python_failures": float(failed)},
        )

    def resume(self, *, key: str, prompt: str, metadata: Mapping[str, Any], turns: Sequence[PastTurn]) -> None:
        """There is no state."""

    def _said(self, ended: Ended) -> str:
        """The end of the standard output, or of what went wrong."""
        said = ended.stdout.decode(errors="replace").strip()
        if ended.how == "timeout":
            said += f"\nit was ended after {self._limits.wall_s:g} s"
        elif ended.how == "output":
            said += "\nit was ended: too much output"
        elif ended.how == "signal":
            said += f"\nit was ended by signal {ended.status}"
        elif ended.status != 0:
            said += f"\n{ended.stderr.decode(errors='replace').strip()}"
        return said[-self._max_chars :].strip() or "(nothing)"
