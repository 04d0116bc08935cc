"""`pmdflow export`: what is asked for, what the Hub would refuse of it, and what was written."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
SHARD_BYTES = 2 * 10**9
"""Most bytes of one file of weights, and so of what is in memory, unless a single tensor is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The command line."""

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


def export_checkpoint(run: Path, out: Path, options: ExportOptions) -> int:
    """Export and say what was written; see `export`.

    Raises:
        PmdflowError: as `export` says.
    """
    if options.push is not None:
        from pmdflow.export.push import push, require_account

        require_account(options.push)
    from pmdflow.export.write import export  # torch and transformers: after what is refused in a second

    checkpoint = export(run, out, options)
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    sys.stdout.write(f"{out}: {checkpoint}, {len(files)} files, {size:,} bytes\n")
    if options.push is not None:
        address = push(out, options.push, message=f"{run.absolute().name}: {checkpoint}")
        sys.stdout.write(f"{address}\n")
    return 0
