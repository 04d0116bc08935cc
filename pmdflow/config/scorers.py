"""`learner.scorers`: models and functions that say something of every generated token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pmdflow.config.imports import IMPORT_PATH
from pmdflow.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from pmdflow.config.schema import Config

TEACHER = "pmdflow.learner.scorers.teacher:Teacher"


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


def scorer_problems(config: Config) -> Iterator[str]:
    """As `combination_problems`, of `learner.scorers`."""
    teachers = {name: given for name, given in config.learner.scorers.items() if given.use == TEACHER}
    if len(teachers) > 1:
        yield (
            f"learner.scorers has {' and '.join(teachers)} that are both {TEACHER}: they would give the same columns; "
            "leave one of them out"
        )
    for name, given in teachers.items():
        if given.when == "claim" and "context" in given.settings:
            yield (
                f"learner.scorers.{name}.settings.context is set while learner.scorers.{name}.when is claim: a context "
                "is made of its prompt's metadata, which a claim does not carry; set when to complete"
            )
