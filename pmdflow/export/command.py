"""`pmdflow export`: what the Hub would refuse is refused first; then the folder, then the upload."""

from __future__ import annotations

import sys
from pathlib import Path

from pmdflow.export.options import ExportOptions


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
