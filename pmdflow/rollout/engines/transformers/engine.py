"""Continuous batching of any full-attention Hugging Face causal language model, on a CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmdflow.errors import PmdflowError
from pmdflow.rollout.engine import OnNewWeights, Output, Request, check_extends, check_joins
from pmdflow.rollout.engines.transformers.cache import ATTENTION, SlotCache
from pmdflow.rollout.engines.transformers.sampling import sample
from pmdflow.rollout.engines.transformers.slots import DecodeBatch, HeldSequence, SlotGroup, plan_slots
from pmdflow.weights.lora import AdapterMerger

_PREFILL_TOKENS = 4096
"""Padded tokens prefilled between two decode steps: bounds how long a newcomer stalls the others, and the mask."""


class TransformersEngine:
    """A `RolloutEngine` on a Hugging Face model.

    Decoding rows are kept in the first slots, so that a step reads the cache as a view. Sequences of different
    lengths share a batch through explicit positions and a 4D mask; the result does not depend on the company.

    Example:
        >>> engine = TransformersEngine(model_path=path, dtype="float32", num_slots=8, threads=1, seed=0)
        >>> engine.add(Request(id=0, tokens=np.array([5, 6], np.int32), limit=9, remaining=9, temperature=1.0))
        >>> engine.step()
        [Output(id=0, tokens=(17,), logprobs=(-5.9,), stop=None)]
    """

    def __init__(
        self,
        *,
        model_path: str,
        dtype: Literal["float32", "bfloat16"],
        num_slots: int,
        threads: int,
        seed: int,
        device: str | None = None,
    ) -> None:
        """Load the model.

        Args:
            model_path: Hugging Face folder or name.
            dtype: Type of weights, cache and computation; log-probs are float32.
            num_slots: Sequences held at a time.
            threads: CPU threads of this process.
            seed: Of the sampling.
            device: Torch device; None takes `cuda` if there is one.

        Raises:
            ValueError: A layer without full attention, or no end-of-sequence token.
        """
        torch.set_num_threads(threads)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
        )
        _require_full_attention(model.config, model_path)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._eos = _eos_ids(model, model_path)
        self._max_length: int | None = getattr(model.config, "max_position_embeddings", None)
        self._vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._cache = SlotCache(num_slots)
        self._adapters = AdapterMerger()
        self._range = torch.arange(0, device=self._device)
        self._sequences: dict[int, HeldSequence] = {}
        self._slots: list[HeldSequence | None] = [None] * num_slots
        self._batch: DecodeBatch | None = None
        self.version = 0
        self.num_slots = num_slots
        self.prefill_tokens = self.drafted_tokens = self.accepted_tokens = 0

    def add(self, request: Request) -> None:
        """Hold a sequence; its prompt is prefilled by the next steps.

        Raises:
            ValueError: No free slot, the id is held already, or the request cannot be generated.
        """
        check_joins(request, self._sequences, self.num_slots)
        self._check(request)
        slot = self._slots.index(None)
        sequence = HeldSequence(
            id=request.id,
            tokens=request.tokens.tolist(),
            limit=request.limit,
            remaining=request.remaining,
            temperature=request.temperature,
            top_p=request.top_p,
            slot=slot,
            min_tokens=request.min_tokens,
            stops=self._eos.union(request.stop_token_ids),
        )
        self._slots[slot] = self._sequences[request.id] = sequence
        self._batch = None

    def extend(self, id: int, limit: int) -> None:
        """Let sequence `id` generate `limit` tokens from where it stands; 0 pauses it.

        Raises:
            ValueError: The sequence is not held, or the limit is negative.
        """
        check_extends(id, limit, self._sequences)
        sequence = self._sequences[id]
        if (sequence.limit > 0) != (limit > 0):
            self._batch = None
        sequence.limit = limit

    def abort(self, id: int) -> None:
        """Forget sequence `id`; unknown ids are ignored."""
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self._slots[sequence.slot] = None
            self._batch = None

    def active(self) -> int:
        """Sequences that have a limit left."""
        return sum(sequence.limit > 0 for sequence in self._sequences.values())

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Prefill newcomers up to a bound, then generate one token for each sequence that is prefilled.

        Returns:
            One `Output` with one token for each; [] only if no sequence has a limit left.

        Raises:
            PmdflowError: The model gave a log-prob that is not finite.
        """
        if self._batch is None:
            self._prefill([sequence for sequence in self._sequences.values() if sequence.limit > 0], bounded=True)
            batch = self._arrange()
            # Kept only while nothing waits for its prefill.
            self._batch = batch if len(batch.sequences) == self.active() else None
        else:
            batch = self._batch
        if not batch.sequences:
            return []
        tokens, logprobs = self._decode(batch)
        if not math.isfinite(sum(logprobs)):
            raise PmdflowError(
                f"log-probs under policy version {self.version} are not finite: the weights have diverged"
            )
        return self._advance(batch.sequences, tokens, logprobs)

    def stage(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing to prepare."""
        return weights

    def pause(self) -> list[Output]:
        """It generates only in `step`."""
        return []

    def resume(self) -> None:
        """Nothing was stopped."""

    def close(self) -> None:
        """There are no processes."""

    @torch.inference_mode()
    def load_weights(self, version: int, staged: Mapping[str, Tensor], *, on_new_weights: OnNewWeights) -> None:
        """Copy `staged` weights, by the names of the model's state dict, into the model; of tied names one suffices.

        Adapters are merged into the weights that the engine was made with.

        Args:
            version: Policy version of the weights.
            staged: Tensors of the model's shapes, or adapters as the learner publishes them; any type and device.
            on_new_weights: `reprefill` recomputes every cached prefix before it returns; otherwise caches stay.

        Raises:
            ValueError: Names or shapes do not fit the model; nothing was changed.
        """
        state: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        weights = self._adapters.merge(staged, state)
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
        self.version = version
        if on_new_weights == "reprefill":
            cached = [sequence for sequence in self._sequences.values() if sequence.cached]
            for sequence in cached:
                sequence.cached = 0
            self._prefill(cached, bounded=False)

    def _check(self, request: Request) -> None:
        if len(request.tokens) == 0:
            raise ValueError(f"sequence {request.id} has no token; a prompt needs at least one")
        if request.limit < 0 or request.remaining < 1 or request.temperature < 0 or not 0 < request.top_p <= 1:
            raise ValueError(
                f"sequence {request.id}: limit {request.limit} must be >= 0, remaining {request.remaining} >= 1, "
                f"temperature {request.temperature} >= 0 and top_p {request.top_p} in (0, 1]"
            )
        outside = [token for token in request.stop_token_ids if not 0 <= token < self._vocab_size]
        if outside:
            raise ValueError(
                f"sequence {request.id}: stop_token_ids {outside} are not among the model's {self._vocab_size} tokens"
            )
        length = len(request.tokens) + request.remaining
        if self._max_length is not None and length > self._max_length:
            raise ValueError(
                f"sequence {request.id} may reach {length} tokens, the model has {self._max_length} positions; "
                "lower data.max_tokens"
            )

    def _prefill(self, sequences: Iterable[HeldSequence], *, bounded: bool) -> None:
        """Cache what is pending, oldest first; `bounded` stops at the bound once one sequence can decode."""
        budget = _PREFILL_TOKENS
        waiting = [sequence for sequence in sequences if sequence.pending]
        some_ready = any(sequence.ready for sequence in self._sequences.values())
        while waiting and (not bounded or budget > 0 or not some_ready):
            width = min(waiting[0].pending, _PREFILL_TOKENS)
            # Much shorter ones would be mostly padding; they go with the next group.
            group = [sequence for sequence in waiting if 2 * sequence.pending >= width]
            group = group[: max(1, _PREFILL_TOKENS // width)]
            self._prefill_group(group, width)
            budget -= width * len(group)
            some_ready = some_ready or any(sequence.ready for sequence in group)
            waiting = [sequence for sequence in waiting if sequence.pending]

    def _prefill_group(self, group: list[HeldSequence], width: int) -> None:
        """Cache up to `width` pending tokens of each; shorter ones are padded on the right, where nothing looks."""
        chunks = [s.tokens[s.cached : s.cached + min(s.pending, width)] for s in group]
        ids = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self._device)
        starts = torch.tensor([s.cached for s in group], device=self._device)
        positions = starts[:, None] + self._positions(width)
        length = width + max(s.cached for s in group)
        rows = torch.tensor([s.slot for s in group], device=self._device)
        self._cache.aim(rows=rows, positions=positions, length=length, read="new" if length == width else "rows")
        self._model.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask(positions, length),
            past_key_values=self._cache,
            use_cache=True,
        )
        for sequence, chunk in zip(group, chunks, strict=True):
            sequence.cached += len(chunk)
            self.prefill_tokens += len(chunk)

    def _arrange(self) -> DecodeBatch:
        """Make the batch of all sequences that are prefilled and have a limit left."""
        held = self._sequences.values()
        plan = plan_slots([s for s in held if s.ready], [s for s in held if not s.ready], num_slots=self.num_slots)
        self._move(plan.slots)
        return self._make_batch(sorted((s for s in held if s.ready), key=lambda s: s.slot), plan.groups)

    def _move(self, targets: Mapping[int, int]) -> None:
        """Give every held sequence the slot in `targets`, by id."""
        moved = [(s.slot, targets[s.id], s) for s in self._sequences.values() if s.slot != targets[s.id]]
        for source, _, _ in moved:
            self._slots[source] = None
        for _, target, sequence in moved:
            self._slots[target] = sequence
            sequence.slot = target
        copies = [(source, target, s.cached) for source, target, s in moved if s.cached]
        if copies:
            sources, rows, lengths = zip(*copies, strict=True)
            self._cache.move(sources=sources, targets=rows, length=max(lengths))

    def _make_batch(self, sequences: list[HeldSequence], groups: list[SlotGroup]) -> DecodeBatch:
        def tensor(values: Iterable[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=self._device)

        greedy = [s.temperature == 0 for s in sequences]
        return DecodeBatch(
            sequences=sequences,
            tokens=tensor((s.tokens[-1] for s in sequences), torch.int64),
            positions=tensor((s.cached for s in sequences), torch.int64),
            slots=torch.arange(len(sequences), device=self._device),
            temperatures=tensor((s.temperature or 1.0 for s in sequences), torch.float32),
            greedy=tensor(greedy, torch.bool) if any(greedy) else None,
            top_p=tensor((s.top_p for s in sequences), torch.float32) if any(s.top_p < 1 for s in sequences) else None,
            excluded=self._excluded(sequences),
            groups=groups,
        )

    def _excluded(self, sequences: list[HeldSequence]) -> Tensor | None:
        """Row and stop id of every sequence that must not end yet, [2, E]."""
        pairs = [(row, token) for row, s in enumerate(sequences) if s.min_tokens > 0 for token in s.stops]
        return torch.tensor(pairs, device=self._device).T if pairs else None

    def _decode(self, batch: DecodeBatch) -> tuple[list[int], list[float]]:
        """Feed each sequence's last token and sample the next; `batch` is moved on by one position."""
        positions = batch.positions[:, None]
        # CUDA kernels want aligned mask rows.
        groups = [(first, end, -(-length // 8) * 8) for first, end, length in batch.groups]
        length = groups[0][2]
        self._cache.aim(rows=batch.slots, positions=positions, length=length, read="first")
        logits = self._model(
            input_ids=batch.tokens[:, None],
            position_ids=positions,
            attention_mask=self._mask(positions, length),
            past_key_values=self._cache,
            use_cache=True,
            slot_groups=groups,
        ).logits[:, -1]
        batch.tokens, logprobs = sample(
            logits,
            temperatures=batch.temperatures,
            greedy=batch.greedy,
            top_p=batch.top_p,
            excluded=batch.excluded,
            generator=self._generator,
        )
        batch.positions = batch.positions + 1
        batch.groups = [(first, end, length + 1) for first, end, length in batch.groups]
        return batch.tokens.tolist(), logprobs.tolist()

    def _advance(self, sequences: list[HeldSequence], tokens: list[int], logprobs: list[float]) -> list[Output]:
        outputs = []
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            sequence.tokens.append(token)
            sequence.cached += 1
            sequence.limit -= 1
            sequence.remaining -= 1
            sequence.min_tokens -= 1
            stop: Literal["stop", "length"] | None = None
            if token in sequence.stops:
                stop = "stop"
            elif sequence.remaining == 0:
                stop = "length"
            if stop is not None:
                self.abort(sequence.id)
            elif sequence.limit == 0 or sequence.min_tokens == 0:
                self._batch = None
            outputs.append(Output(id=sequence.id, tokens=(token,), logprobs=(logprob,), stop=stop))
        return outputs

    def _mask(self, positions: Tensor, length: int) -> Tensor:
        """Additive causal mask [B, 1, Q, length] of queries at `positions` [B, Q]."""
        hidden = self._positions(length) > positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=self._device)
        return mask.masked_fill_(hidden, -math.inf)

    def _positions(self, length: int) -> Tensor:
        if length > len(self._range):
            self._range = torch.arange(2 * length, device=self._device)
        return self._range[:length]


def _require_full_attention(config: Any, model_path: str) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"{model_path} has layers without full attention ({', '.join(sorted(kinds)) or 'sliding window'}): "
            "the transformers engine cannot cache them; choose another model"
        )


def _eos_ids(model: Any, model_path: str) -> frozenset[int]:
    """End-of-sequence ids of the generation config; of the tokenizer where that has none."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = AutoTokenizer.from_pretrained(model_path).eos_token_id
    if ids is None:
        raise ValueError(f"{model_path} names no eos_token_id; set it in generation_config.json")
    return frozenset([ids] if isinstance(ids, int) else ids)
