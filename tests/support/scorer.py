"""Scorers of tests."""

from __future__ import annotations

import numpy as np
import torch

from pmdflow.learner.algorithms import Algorithm, Credit
from pmdflow.learner.losses import pmd_tokens
from pmdflow.learner.scorers.protocol import ColumnSpec, Outcome, Setup, TokenBatch


class Counter:
    """Says how many claims it has learned from."""

    columns = (ColumnSpec(name="claims", dtype="float32"),)

    def __init__(self, setup: Setup) -> None:
        self.claims = torch.zeros(1)

    def score(self, batch: TokenBatch) -> dict[str, np.ndarray]:
        return {"claims": np.full(int(batch.generated.sum()), float(self.claims), np.float32)}

    def learn(self, batch: TokenBatch, outcome: Outcome) -> dict[str, float]:
        sequences = torch.tensor([float(len(outcome.rewards))])
        outcome.add([sequences])
        self.claims += 1
        return {"claims": float(self.claims), "sequences": float(sequences)}

    def state(self) -> torch.Tensor:
        return self.claims

    def load(self, state: torch.Tensor) -> None:
        self.claims = state


def solution(metadata: dict) -> list[int]:
    return metadata["solution"]


READS = Algorithm(
    credit=lambda view, learner, state: Credit(values=view.columns["claims"] - 1.0, per="token"),
    loss=pmd_tokens,
    columns=frozenset({"claims"}),
)
