"""What of a run is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
SHARD_BYTES = 2 * 10**9
"""Most bytes of one file of weights, and so of what is in memory, unless a single tensor is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is asked for."""

    iteration: int | None = None
    """That of the checkpoint; None takes the newest one."""
    adapter: bool = False
    """Only the adapters of a run that trains these, as a PEFT folder; false adds them to the weights."""
    dtype: Dtype | None = None
    """Type of the weights; None is the one that the run generated with, and of adapters float32."""
    push: str | None = None
    """Repository of the Hub that the folder is uploaded to."""
    shard_bytes: int = SHARD_BYTES
    """Most bytes of one file."""
