"""Settings of the way of weights that contradict others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmdflow.config.schema import Config


def weights_problems(config: Config) -> Iterator[str]:
    """Where there is no delta to send, or it would be as long as the file."""
    if not config.weights.delta:
        return
    if config.weights.transport != "object_store":
        yield (
            f"weights.delta is true while weights.transport is {config.weights.transport}: every node reads the whole "
            "file there; set transport to object_store, or leave delta out"
        )
    if config.learner.lora is not None:
        yield (
            "weights.delta is true while learner.lora is set: adapters are all that is published, and each of their "
            "weights changes; leave delta out"
        )
    if config.model.dtype == "float32":
        yield (
            "weights.delta is true while model.dtype is float32: each weight changes in every step; set dtype to "
            "bfloat16, or leave delta out"
        )
