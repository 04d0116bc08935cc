"""A frozen teacher: what it says of the student's tokens, scored once, as soon as a trajectory is complete."""

from __future__ import annotations

from typing import Any

import torch

from pmdflow.config.imports import load_named
from pmdflow.learner.scorers.model import ScoringModel
from pmdflow.learner.scorers.protocol import Column, ColumnSpec, Setup, TokenBatch

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
