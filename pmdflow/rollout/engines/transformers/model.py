"""A Hugging Face causal language model with the key-value cache of all slots: rows and positions in, logits out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pmdflow.learner.agreement import plain_scores
from pmdflow.learner.aside import Aside
from pmdflow.learner.layers import family_problems, windows
from pmdflow.learner.lora import bound_adapters
from pmdflow.learner.routing import Routing
from pmdflow.rollout.engines.transformers.batch import DecodeBatch
from pmdflow.rollout.engines.transformers.cache import ATTENTION, SlotCache
from pmdflow.rollout.engines.transformers.self_check import check_cached
from pmdflow.weights.lora import has_adapters


class CachedModel:
    """The model of an engine. It knows slots, not sequences; the result for a row does not depend on the others.

    Example:
        >>> model = CachedModel(path=path, dtype="float32", num_slots=8, device=torch.device("cpu"))
        >>> model.prefill([[5, 6], [7]], slots=[0, 1], starts=[0, 0])
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["float32", "bfloat16"],
        num_slots: int,
        device: torch.device,
        record_experts: bool = False,
    ) -> None:
        """Load the model of a Hugging Face folder.

        Raises:
            ValueError: A layer that keeps more than keys and values, or log-probs that the plain model does not give.
        """
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
        )
        _require_cacheable(model, path)
        self.device = device
        self._model = model.to(device).eval().requires_grad_(False)
        self.max_length: int | None = getattr(model.config, "max_position_embeddings", None)
        """Its positions; None if it names no bound."""
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self._windows = windows(model.config)
        self._cache = SlotCache(num_slots)
        self._num_slots = num_slots
        self._aside = Aside()
        self._range = torch.arange(0, device=device)
        check_cached(self, self._model, num_slots=num_slots)
        self._cache = SlotCache(num_slots)
        self.routing = Routing(self._model) if record_experts else None
        """Records the experts of each forward pass; None if nobody asks."""

    def prefill(self, chunks: Sequence[Sequence[int]], *, slots: Sequence[int], starts: Sequence[int]) -> None:
        """Cache a chunk of tokens in each slot, from position `starts` on."""
        width = max(len(chunk) for chunk in chunks)
        # Shorter ones are padded on the right, where nothing looks.
        ids = torch.tensor([[*chunk, *[0] * (width - len(chunk))] for chunk in chunks], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + self._positions(width)
        length = width + max(starts)
        rows = torch.tensor(slots, device=self.device)
        self._cache.aim(rows=rows, positions=positions, length=length, read="new" if length == width else "rows")
        self._model.base_model(
            input_ids=ids,
            position_ids=positions,
            **self._masks(positions, length),
            past_key_values=self._cache,
            use_cache=True,
        )

    def decode(self, batch: DecodeBatch) -> Tensor:
        """Feed the last token of each row; returns the logits of the next ones [B, V]."""
        positions = batch.positions[:, None]
        # CUDA kernels want aligned mask rows.
        groups = [(first, end, -(-length // 8) * 8) for first, end, length in batch.groups]
        length = groups[0][2]
        self._cache.aim(rows=batch.slots, positions=positions, length=length, read="first")
        logits: Tensor = self._model(
            input_ids=batch.tokens[:, None],
            position_ids=positions,
            **self._masks(positions, length),
            past_key_values=self._cache,
            use_cache=True,
            slot_groups=groups,
        ).logits
        return logits[:, -1]

    def move(self, *, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of slots `sources` to slots `targets`; they may overlap."""
        self._cache.move(sources=sources, targets=targets, length=length)

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the model, by the names of its state dict; of tied names one suffices.

        Adapters work beside the weights that the model was made with, as they do in the learner.

        Args:
            version: Policy version of the weights, for the message.
            weights: Tensors of the model's shapes, or adapters as the learner publishes them; any type and device.

        Raises:
            ValueError: Names or shapes do not fit the model; nothing was changed.
        """
        adapted = has_adapters(weights)
        state = bound_adapters(self._model, weights) if adapted else self._model.state_dict(keep_vars=True)
        given = {id(state[name]) for name in weights if name in state}
        missing = sorted(name for name, tensor in state.items() if id(tensor) not in given)
        unexpected = sorted(weights.keys() - state.keys())
        shapes = sorted(name for name in weights.keys() & state.keys() if weights[name].shape != state[name].shape)
        if missing or unexpected or shapes:
            raise ValueError(
                f"weights of policy version {version} do not fit {type(self._model).__name__}: "
                f"missing {missing}, unexpected {unexpected}, of another shape {shapes}; publish its state dict"
            )
        for name, tensor in weights.items():
            state[name].copy_(tensor)

    def sleep(self) -> None:
        """Put the weights aside and forget the cache."""
        self._cache = SlotCache(self._num_slots)
        self._aside.put([*self._model.parameters(), *self._model.buffers()])

    def wake(self) -> None:
        """Take the weights back; nothing is cached."""
        self._aside.take_back()

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of the tokens after the first, computed without the cache; of as many as there are positions."""
        (scores,) = plain_scores(self._model, [tokens[: self.max_length]])
        return scores.tolist()

    def _masks(self, positions: Tensor, length: int) -> dict[str, Any]:
        """Additive masks [B, 1, Q, length] of queries at `positions` [B, Q]: of layers that see all, and of windows."""
        keys, queries = self._positions(length), positions[:, None, :, None]
        later = keys > queries
        masks: dict[str, Any] = {"attention_mask": self._additive(later)}
        if self._windows:
            masks["window_masks"] = {
                window: self._additive(later | (keys <= queries - window)) for window in self._windows
            }
        return masks

    def _additive(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=self.device)
        return mask.masked_fill_(hidden, -math.inf)

    def _positions(self, length: int) -> Tensor:
        if length > len(self._range):
            self._range = torch.arange(2 * length, device=self.device)
        return self._range[:length]


def _require_cacheable(model: Any, path: str) -> None:
    problems = list(family_problems(model.config, model))
    if problems:
        raise ValueError(
            f"{path}, a {model.config.model_type}, has {', '.join(problems)}: the transformers engine cannot cache it; "
            "choose another model, or rollout.engine=vllm"
        )
