"""A claim computed again by itself: sequence by sequence, in float64, without packing, chunks or FSDP."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pmdflow.types import Mask


class Whole:
    """Every sequence of a batch by itself, in float64: log-probs, entropies and masks of its generated tokens."""

    def __init__(self, path, batch):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        self.batch = batch
        self.logprobs, self.entropies, self.trained, self.behavior, self.versions = [], [], [], [], []
        for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            lp, entropy = self.scores(batch.tokens[first:last], batch.temperatures[first:last])
            chosen = torch.from_numpy((batch.mask[first:last] & Mask.GENERATED) != 0)
            self.logprobs.append(lp[chosen[1:]])
            self.entropies.append(entropy[chosen[1:]])
            self.trained.append(torch.from_numpy((batch.mask[first:last] & Mask.TRAINED) != 0)[chosen])
            self.behavior.append(torch.from_numpy(batch.logprobs[first:last].astype(np.float64))[chosen])
            self.versions.append(torch.from_numpy(batch.versions[first:last])[chosen])

    def scores(self, tokens, temperatures):
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = self.model(ids[None]).logits[0, :-1] / torch.from_numpy(temperatures[1:, None].astype(np.float64))
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(1, ids[1:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)

    def active(self):
        return [index for index, trained in enumerate(self.trained) if trained.any()]

    def first_step(self, *, tau, advantages, weights=None):
        """The PMD loss of one step over the whole claim, log pi_i = log pi_theta: u is 0, but has a gradient."""
        terms = []
        for index in self.active():
            lp, trained = self.logprobs[index], self.trained[index]
            u = (lp - lp.detach())[trained].sum()
            weight = 1.0 if weights is None else weights[index]
            terms.append(weight * tau / 2 * (advantages[index] / tau - u) ** 2 / len(lp))
        return torch.stack(terms).mean()

    def grad_norm(self, loss):
        gradients = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True, allow_unused=True)
        return float(torch.sqrt(sum((g**2).sum() for g in gradients if g is not None)))
