"""A frozen teacher: what it says of the student's tokens, scored once, as soon as a trajectory is complete."""

from __future__ import annotations

from typing import Any

import torch

from pmdflow.config.imports import load_named
from pmdflow.config.schema import LearnerConfig
from pmdflow.learner.scorers.model import ScoringModel
from pmdflow.learner.scorers.protocol import Column, ColumnSpec, Setup, TokenBatch
from pmdflow.learner.view import FROM_TEACHER, Need

TEACHER, TOP_IDS, TOP_LOGPROBS = "teacher", "teacher_top_ids", "teacher_top"
"""Names of its columns."""


class Teacher:
    """Log-probs of a frozen model at the temperature that tokens were drawn at.

    `settings.top` is the number of its likeliest tokens whose ids and log-probs are kept, too (0), and
    `settings.context` the import path of a function from a prompt's metadata to the token ids of a context that the
    teacher alone sees before the prompt, such as a worked solution.
    """

    def __init__(self, setup: Setup) -> None:
        """Load the model: the student's own initial weights where no other is named.

        Raises:
            ValueError: a setting is not known, or the model is not one.
        """
        unknown = sorted(setup.settings.keys() - {"top", "context"})
        if unknown:
            raise ValueError(f"settings.{unknown[0]} is not known; a teacher has top and context")
        self._top = int(setup.settings.get("top", 0))
        context = setup.settings.get("context")
        self._context: Any = None if context is None else load_named(context)
        self._model = ScoringModel(setup).freeze()
        tops = (
            ColumnSpec(name=TOP_IDS, dtype="int32", shape=(self._top,)),
            ColumnSpec(name=TOP_LOGPROBS, dtype="float32", shape=(self._top,)),
        )
        self.columns = (ColumnSpec(name=TEACHER, dtype="float32"), *(tops if self._top else ()))

    @torch.no_grad()
    def score(self, batch: TokenBatch) -> dict[str, Column]:
        """Its columns."""
        if self._context is not None:
            batch = batch.with_contexts([self._context(metadata) for metadata in batch.metadata])
        found = {spec.name: spec.filled(int(batch.generated.sum())) for spec in self.columns}
        for place, scores in self._model.scores(batch, top=self._top):
            found[TEACHER][place] = scores.logprobs.cpu().numpy()
            if scores.top is not None and scores.top_logprobs is not None:
                found[TOP_IDS][place] = scores.top.cpu().numpy()
                found[TOP_LOGPROBS][place] = scores.top_logprobs.cpu().numpy()
        return found


def require_teacher(needs: frozenset[Need], learner: LearnerConfig) -> None:
    """Refuse an algorithm without the teacher that it needs, one that needs none with a teacher, and two teachers.

    Raises:
        ValueError: as said.
    """
    taught, by_columns = needs & FROM_TEACHER, TEACHER in learner.scorers
    given = (learner.teacher is not None) + by_columns
    if (by_columns and given == 1) or given == bool(taught):
        return
    also = " and learner.scorers.teacher is set, too" if by_columns else ""
    raise ValueError(
        f"learner.teacher is {learner.teacher} while {learner.algorithm} needs "
        f"{', '.join(sorted(needs)) or 'nothing'}{also}: set a teacher if it needs `teacher` or "
        "`top`, in one of the two ways"
    )
