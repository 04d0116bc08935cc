"""PRIME: process rewards of a model that is trained on outcomes alone. A learning scorer, and credit of its column.

The credit is the paper's; the released code leaves beta out of the scores, has the own mean in baselines, and whitens.
Source: arXiv:2502.01456.
"""

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from pmdflow.learner.advantage import pmd_mean
from pmdflow.learner.algorithms import Algorithm, Credit
from pmdflow.learner.losses import pmd_tokens
from pmdflow.learner.scorers.model import ScoringModel, TrainedScorer, packed
from pmdflow.learner.scorers.protocol import ColumnSpec


class ImplicitReward(TrainedScorer):
    """beta (log pi_phi - log pi_ref) of the drawn token; phi learns outcomes by cross entropy before it scores."""

    columns = (ColumnSpec(name="process", dtype="float32"),)
    learns_first = True

    def __init__(self, setup):
        self.beta = float(setup.settings.get("beta", 0.05))
        self.model, self.reference = ScoringModel(setup), ScoringModel(setup).freeze()
        super().__init__(self.model.policy, lr=float(setup.settings.get("lr", 1e-6)))

    def _rewards(self, batch):
        for (place, own), (_, other) in zip(self.model.scores(batch), self.reference.scores(batch), strict=True):
            yield batch.sequences[place], self.beta * (own.logprobs - other.logprobs)

    @torch.no_grad()
    def score(self, batch):
        """The process reward of each token."""
        return {"process": packed(part for _, part in self._rewards(batch))}

    def learn(self, batch, outcome):
        """One step on sigmoid(sum of process rewards) of each sequence."""
        total, count = 0.0, float(outcome.shares[batch.counts > 0].sum())
        for sequences, part in self._rewards(batch):
            rows, index = np.unique(sequences, return_inverse=True)
            sums = part.new_zeros(len(rows)).index_add(0, torch.from_numpy(index).to(part.device), part)
            target, share = (torch.from_numpy(own[rows]).to(sums) for own in (outcome.correct, outcome.shares))
            loss = binary_cross_entropy_with_logits(sums, target, share, reduction="sum")
            loss.backward()
            total += float(loss.detach())
        return {"cross_entropy": total / max(count, 1e-9), "grad_norm": self.step(outcome, count)}


def credit(view, learner, state):
    """Return-to-go of process rewards minus the others' means, and the leave-one-out outcome."""
    process = view.columns["process"].astype(np.float64)
    means = view.episode_means(process)
    before = np.concatenate([[0.0], np.cumsum(process - (means - pmd_mean(means, view.groups))[view.episodes])])
    to_go = before[view.cu_seqlens[1:]][view.episodes] - before[:-1]
    return Credit(values=to_go + pmd_mean(view.rewards, view.groups)[view.episodes], per="token")


PRIME = Algorithm(credit=credit, loss=pmd_tokens, columns=frozenset({"process"}))
