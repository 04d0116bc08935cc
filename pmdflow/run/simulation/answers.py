"""The answers of a simulation: how long they are, and what they are worth."""

from __future__ import annotations

import numpy as np

from pmdflow.run.simulation.settings import SimulationSettings


class Answers:
    """Draws lengths a group at a time, when its first member begins, and rewards when they are asked for."""

    def __init__(self, settings: SimulationSettings, rng: np.random.Generator) -> None:
        """Draw nothing yet."""
        self._settings = settings
        self._rng = rng
        self._lengths: dict[int, int] = {}
        """Of trajectories that have begun and not ended."""
        self._unused: dict[int, list[int]] = {}
        """Of each group: lengths of members that have not begun."""
        self._dull: dict[int, bool] = {}
        """Whether a group's members all get the same reward."""

    def length(self, trajectory: int, group: int) -> int:
        """Tokens that a trajectory will have, each time the same."""
        if trajectory not in self._lengths:
            if group not in self._unused:
                drawn = self._settings.lengths.group(self._rng, self._settings.group_size)
                self._unused[group] = [min(length, self._settings.max_tokens) for length in drawn]
            self._lengths[trajectory] = self._unused[group].pop()
            if not self._unused[group]:
                del self._unused[group]
        return self._lengths[trajectory]

    def end(self, trajectory: int) -> None:
        """A trajectory is complete."""
        del self._lengths[trajectory]

    def reward(self, group: int) -> float:
        """Reward of a member: 0 or 1."""
        if group not in self._dull:
            self._dull[group] = bool(self._rng.random() < self._settings.no_signal_share)
        return 1.0 if self._dull[group] else float(self._rng.integers(2))
