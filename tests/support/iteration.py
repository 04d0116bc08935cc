"""An iteration of the learner, computed in another way."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pmdflow.config.schema import Config
from pmdflow.learner.advantage import pmd_mean
from pmdflow.types import Mask, TrainBatch


def independent_iteration(config: Config, batch: TrainBatch):
    """The iteration written again: whole sequences one by one, in float64, without FSDP, packing or chunks."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64).eval()
    learner = config.learner
    optimizer = torch.optim.AdamW(model.parameters(), lr=learner.lr, betas=(0.9, 0.95), weight_decay=0.0)
    own = batch.trajectories if batch.branches is None else batch.branches.episodes
    episodes, first, counts = np.unique(own, return_index=True, return_counts=True)
    advantages = pmd_mean(batch.rewards[first], batch.groups[first])[np.searchsorted(episodes, own)]
    shares = 1 / counts[np.searchsorted(episodes, own)]

    def logprobs(index):
        part = slice(batch.cu_seqlens[index], batch.cu_seqlens[index + 1])
        ids = torch.from_numpy(batch.tokens[part].astype(np.int64))
        logits = model(ids[None]).logits[0, :-1] / torch.from_numpy(batch.temperatures[part][1:, None])
        return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    with torch.no_grad():
        reference = [logprobs(index) for index in range(len(batch.rewards))]
    losses, norms, u_values, tokens = [], [], [], 0
    for chunk in np.array_split(np.unique(batch.groups), learner.steps_per_iteration):
        terms, weights = [], []
        for index in np.flatnonzero(np.isin(batch.groups, chunk)):
            flags = torch.from_numpy(batch.mask[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]])[1:]
            trained, generated = (flags & Mask.TRAINED) != 0, (flags & Mask.GENERATED) != 0
            if not trained.any():
                continue
            lp = logprobs(index)
            u = ((lp - reference[index])[trained]).sum() + (lp - reference[index]).detach()[generated & ~trained].sum()
            u_values.append(u.item())
            tokens += int(generated.sum())
            weights.append(shares[index])
            terms.append(shares[index] * learner.tau / 2 * (advantages[index] / learner.tau - u) ** 2 / generated.sum())
        optimizer.zero_grad()
        loss = torch.stack(terms).sum() / sum(weights)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), learner.max_grad_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, u_values, tokens, model.state_dict()
