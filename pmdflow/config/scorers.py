"""`learner.scorers`: models and functions that say something of every generated token."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pmdflow.config.imports import IMPORT_PATH
from pmdflow.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class ScorerConfig(Section):
    """One token scorer; its columns are what an algorithm of that column's name reads."""

    use: str = Field(pattern=IMPORT_PATH)
    """Import path `package.module:name`, found like a reward function, of what makes a `TokenScorer` from its
    `Setup`; `pmdflow.learner.scorers.teacher:Teacher` is a frozen teacher."""
    when: Literal["complete", "claim"] = "complete"
    """`complete`: frozen ones, in actors of their own, once for each trajectory as soon as it is complete, before its
    reward; what they say is durable. `claim`: in the learner, at each claim, for those that learn."""
    model: str | None = None
    """Folder of its model (found like `model.path`); null is none, or the policy's initial weights."""
    settings: dict[str, Any] = {}
    """What it makes of them is its own matter."""
    actors: PositiveInt = 1
    """Processes that score complete trajectories."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of each, as Ray counts them; 0 scores on processors."""
    threads: PositiveInt = 1
    """CPU threads of each."""
    timeout_s: PositiveFloat = 120.0
    """What an actor has not scored after this long is given to another."""
