"""A scorer that its process does not survive."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pmdflow.learner.scorers.protocol import Column, ColumnSpec, Setup, TokenBatch


class Deadly:
    """Ends its process at the first trajectory that it ever saw, which a file remembers."""

    columns = (ColumnSpec(name="said", dtype="float32"),)

    def __init__(self, setup: Setup) -> None:
        self._file = Path(str(setup.settings["file"]))

    def score(self, batch: TokenBatch) -> Mapping[str, Column]:
        own = [batch.part(slice(row, row + 1)).tokens.tobytes() for row in range(len(batch.counts))]
        if not self._file.exists():
            self._file.write_bytes(own[0])
        if self._file.read_bytes() in own:
            os._exit(9)
        return {"said": np.zeros(int(batch.generated.sum()), np.float32)}
