"""What an engine that has loaded the learner's weights must give for a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pmdflow.config.schema import Config
from pmdflow.learner.agreement import rounding, tokens_of
from pmdflow.learner.fsdp import DTYPES
from pmdflow.learner.policy import Layout, Policy
from pmdflow.weights.probe import Probe


class Prober:
    """Scores the same tokens with each version. Every rank makes one and must make the same calls."""

    def __init__(self, policy: Policy, *, config: Config, device: torch.device) -> None:
        """Score them with the weights that the run begins with, which `policy` has now."""
        self._policy = policy
        self._dtype = DTYPES[config.model.dtype]
        self._packing = config.learner.packing
        self._tokens = torch.tensor(tokens_of(policy.model), device=device)
        self._initial = self._scores()

    def probe(self) -> Probe:
        """What the present weights give."""
        scores = self._scores()
        return Probe(
            tokens=tuple(self._tokens.tolist()),
            scores=scores.double().numpy(),
            initial=self._initial.double().numpy(),
            limit=2 * rounding(scores, self._policy.model, self._dtype),  # the engine rounds as much as the learner
            by_median=self._dtype != torch.float32,
        )

    @torch.no_grad()
    def _scores(self) -> Tensor:
        tokens, count = self._tokens, len(self._tokens) - 1
        layout = Layout.of((len(tokens),), packed=self._packing, device=tokens.device)
        ones, positions = torch.ones(count, device=tokens.device), torch.arange(count, device=tokens.device)
        scores: Tensor = self._policy(tokens[None], layout, positions, tokens[1:], ones).logprobs
        return scores.float().cpu()
