"""Weights into an engine, and the proof that it serves them."""

from __future__ import annotations

import time
from typing import Any

from pmdflow.errors import EngineDied
from pmdflow.rollout.engine import OnNewWeights, RolloutEngine
from pmdflow.weights.probe import LoadCheck, Probe


class Loader:
    """Loads staged weights into a paused engine and lets it go on, if they are what it serves."""

    def __init__(self, engine: RolloutEngine, *, mode: OnNewWeights) -> None:
        """Load into `engine`."""
        self._engine = engine
        self._mode = mode
        self._check: LoadCheck | None = None
        self.seconds = 0.0
        """That loads took since the start."""

    def expect(self, probe: Probe | None) -> None:
        """Score the first probe by the weights that there are; before the engine is paused to load others."""
        if self._check is None and probe is not None:
            self._check = LoadCheck(self._engine.score(probe.tokens), is_known=self._engine.version == 0)

    def load(self, version: int, staged: Any, probe: Probe | None) -> None:
        """Load a version and resume; nothing that is generated from then on is given out before the proof.

        Raises:
            EngineDied: the engine serves something else. What it has generated since is of no version.
        """
        began = time.monotonic()
        self._engine.load_weights(version, staged, on_new_weights=self._mode)
        self._engine.resume()
        self.seconds += time.monotonic() - began
        if probe is None or self._check is None:
            return
        problem = self._check.problem(probe, self._engine.score(probe.tokens))
        if problem is not None:
            raise EngineDied(f"version {version} was loaded, but is not what the engine serves: {problem}")
