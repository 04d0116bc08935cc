"""A causal language model over a `TokenBatch`: what scorers that hold one share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pmdflow.learner.loading import load_model
from pmdflow.learner.policy import Layout, Policy
from pmdflow.learner.scorers.protocol import Outcome, Setup, TokenBatch
from pmdflow.learner.token_scores import TokenScores
from pmdflow.types import Float32


class ScoringModel:
    """A model on its device, in batches of `Setup.tokens_per_batch` padded tokens."""

    def __init__(self, setup: Setup, *, path: str | None = None) -> None:
        """Load `path`, else the model of the setup, else the student's.

        Raises:
            ValueError: it is no causal language model, or has other tokens than the student.
        """
        self._setup = setup
        found = path or setup.model or setup.student
        self.policy = Policy(load_model(found, packing=False).to(setup.device).eval())
        if self.policy.model.config.get_text_config().vocab_size != _num_tokens(setup.student):
            raise ValueError(f"{found} has other tokens than {setup.student}, which it scores the tokens of")

    @property
    def hidden_size(self) -> int:
        """H of `hidden`."""
        return int(self.policy.model.config.get_text_config().hidden_size)

    def freeze(self) -> ScoringModel:
        """Itself, without gradients from here on."""
        self.policy.requires_grad_(requires_grad=False)
        return self

    def scores(self, batch: TokenBatch, *, top: int = 0) -> Iterator[tuple[slice, TokenScores]]:
        """By part of the batch, its place among the scored tokens and what the model says of these."""
        for rows, place in _parts(batch, self._setup.tokens_per_batch):
            own = batch.part(rows)
            with self._precision():
                yield place, self.policy(*_inputs(own, self._setup.device), top=top)

    def hidden(self, batch: TokenBatch) -> Iterator[tuple[slice, Tensor]]:
        """By part, the last hidden states [p, H] that the scored tokens were drawn from."""
        for rows, place in _parts(batch, self._setup.tokens_per_batch):
            tokens, layout, positions, *_ = _inputs(batch.part(rows), self._setup.device)
            with self._precision():
                decoder = self.policy.model.get_decoder()
                states = decoder(input_ids=tokens, **layout.arguments()).last_hidden_state
            yield place, states.flatten(0, 1)[positions].float()

    def _precision(self) -> Any:
        if self._setup.dtype == "float32":
            return nullcontext()
        return torch.autocast(self._setup.device.type, dtype=torch.bfloat16)


def packed(parts: Iterable[Tensor]) -> Float32:
    """The values of a batch's parts as one column [P]."""
    return np.concatenate([np.zeros(0, np.float32), *(part.detach().float().cpu().numpy() for part in parts)])


class TrainedScorer:
    """Modules that learn, with AdamW, and what a checkpoint keeps of them; every rank has the same."""

    def __init__(self, *modules: nn.Module, lr: float) -> None:
        self._modules = modules
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        self._trained = trained

    def step(self, outcome: Outcome, count: float) -> float:
        """One step by the accumulated gradient over the `count`s of all ranks; its norm. All ranks must call."""
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        total = torch.tensor([count], dtype=torch.float64, device=gradients[0].device)
        outcome.add([*gradients, total])
        for gradient in gradients:
            gradient /= max(float(total), 1e-9)
        norm = float(nn.utils.clip_grad_norm_(self._trained, 1.0))
        if float(total) > 0:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, Any]:
        """Of modules and optimizer."""
        modules = [module.state_dict() for module in self._modules]
        return {"modules": modules, "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        for module, own in zip(self._modules, state["modules"], strict=True):
            module.load_state_dict(own)
        self._optimizer.load_state_dict(state["optimizer"])


def _num_tokens(path: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(path).get_text_config().vocab_size)


def _parts(batch: TokenBatch, limit: int) -> Iterator[tuple[slice, slice]]:
    """Sequences that fit into one forward pass, padded, and the place of their scored tokens."""
    lengths, counts = np.diff(batch.cu_seqlens), np.concatenate([[0], np.cumsum(batch.counts)])
    start = 0
    for row in range(1, len(lengths) + 1):
        if row == len(lengths) or (row + 1 - start) * lengths[start : row + 1].max() > limit:
            if counts[row] > counts[start]:
                yield slice(start, row), slice(int(counts[start]), int(counts[row]))
            start = row


def _inputs(batch: TokenBatch, device: Any) -> tuple[Tensor, Layout, Tensor, Tensor, Tensor]:
    lengths = np.diff(batch.cu_seqlens)
    width = int(lengths.max())
    tokens = np.zeros((len(lengths), width), np.int64)
    place = np.repeat(np.arange(len(lengths)) * width - batch.cu_seqlens[:-1], lengths) + np.arange(len(batch.tokens))
    tokens.reshape(-1)[place] = batch.tokens
    chosen = np.flatnonzero(batch.generated)
    return (
        torch.from_numpy(tokens).to(device),
        Layout.of(tuple(lengths.tolist()), packed=False, device=device),
        torch.from_numpy(place[chosen] - 1).to(device),
        torch.from_numpy(batch.tokens[chosen].astype(np.int64)).to(device),
        torch.from_numpy(batch.temperatures[chosen]).to(device),
    )
