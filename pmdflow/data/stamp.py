"""What the configuration adds to the metadata of a source's prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pmdflow.config.sources import SOURCE_KEY
from pmdflow.data.sampling import KEY


@dataclass(frozen=True, slots=True)
class Stamp:
    """Where a prompt comes from, and how it is sampled if it does not say so itself."""

    source: str | None = None
    """Metadata key `prompt_source`, by which rewards tell the sources of a mixture and evaluation sets apart; None is
    the only source."""
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def on(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The stamped metadata.

        Example:
            >>> Stamp("gsm8k").on({"answer": "72"})
            {'answer': '72', 'prompt_source': 'gsm8k'}
        """
        stamped = dict(metadata)
        if self.source is not None:
            stamped[SOURCE_KEY] = self.source
        if self.sampling:
            stamped[KEY] = {**self.sampling, **stamped.get(KEY, {})}
        return stamped
