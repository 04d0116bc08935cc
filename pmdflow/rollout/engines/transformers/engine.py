"""Continuous batching of a Hugging Face causal language model whose layers attend, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pmdflow.data.tokenizer import end_ids
from pmdflow.learner.routing import EXPERTS
from pmdflow.rollout.checks import check_extends, check_joins, check_logprobs, check_request
from pmdflow.rollout.engine import OnNewWeights, Output, Request
from pmdflow.rollout.engines.transformers.batch import DecodeBatch
from pmdflow.rollout.engines.transformers.model import CachedModel
from pmdflow.rollout.engines.transformers.sampling import sample
from pmdflow.rollout.engines.transformers.slots import HeldSequence, plan_slots
from pmdflow.weights.file import WeightsFile

_PREFILL_TOKENS = 4096
"""Padded tokens prefilled between two decode steps: bounds how long a newcomer stalls the others, and the mask."""


class TransformersEngine:
    """A `RolloutEngine` on a Hugging Face model.

    Decoding rows are in the first slots, so that a step reads the cache as a view; a 4D mask lets any lengths share it.

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
        record_experts: bool = False,
    ) -> None:
        """Load the model.

        Args:
            model_path: Hugging Face folder. Of its generation settings only the end-of-sequence ids are used.
            dtype: Type of weights, cache and computation; log-probs are float32.
            num_slots: Sequences held at a time.
            threads: CPU threads of this process.
            seed: Of the sampling.
            device: Torch device; None takes `cuda` if there is one.
            record_experts: Whether outputs have the column `experts` of a Mixture of Experts.

        Raises:
            ValueError: A layer that keeps more than keys and values, or no end-of-sequence token.
        """
        torch.set_num_threads(threads)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        ends = end_ids(model_path)
        self._model = CachedModel(
            path=model_path, dtype=dtype, num_slots=num_slots, device=place, record_experts=record_experts
        )
        self._ends = frozenset(id for id in ends if id < self._model.vocab_size)
        self._generator = torch.Generator(place).manual_seed(seed)
        self._sequences: dict[int, HeldSequence] = {}
        self._slots: list[HeldSequence | None] = [None] * num_slots
        self._batch: DecodeBatch | None = None
        self.version = 0
        self.num_slots = num_slots
        self.prefill_tokens = self.drafted_tokens = self.accepted_tokens = self.overrun_tokens = self.preemptions = 0

    def add(self, request: Request) -> None:
        """Hold a sequence; its prompt is prefilled by the next steps.

        Raises:
            ValueError: No free slot, the id is held already, or the request cannot be generated.
        """
        check_joins(request, self._sequences, self.num_slots)
        check_request(request, vocab_size=self._model.vocab_size, max_length=self._model.max_length)
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
            stops=self._ends.union(request.stop_token_ids),
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
            An `Output` of one token for each; [] only if no sequence has a limit left.

        Raises:
            PmdflowError: The model gave a log-prob that is not finite.
        """
        batch = self._batch
        if batch is None:
            self._prefill([sequence for sequence in self._sequences.values() if sequence.limit > 0], bounded=True)
            batch = self._arrange()
            # Kept only while nothing waits for its prefill.
            self._batch = batch if len(batch.sequences) == self.active() else None
        if not batch.sequences:
            return []
        tokens, logprobs = self._decode(batch)
        check_logprobs(logprobs, self.version)
        routing = self._model.routing
        experts = None if routing is None else routing.taken().cpu().numpy().astype(routing.dtype)
        return self._advance(batch.sequences, tokens, logprobs, experts)

    def stage(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Map a node's file."""
        if isinstance(weights, WeightsFile):
            weights.populate()
        return weights

    def pause(self) -> list[Output]:
        """It generates only in `step`."""
        return []

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of the tokens after the first, by a forward pass of its own."""
        return self._model.score(tokens)

    def resume(self) -> None:
        """Nothing was stopped."""

    def sleep(self) -> None:
        """Weights to the host, the cache forgotten; held sequences are prefilled again after `wake`."""
        self._model.sleep()
        self._batch = None
        for sequence in self._sequences.values():
            sequence.cached = 0

    def wake(self) -> None:
        """Weights into the device's memory again; the cache grows as it is needed."""
        self._model.wake()

    def close(self) -> None:
        """There are no processes."""

    @torch.inference_mode()
    def load_weights(self, version: int, staged: Mapping[str, Tensor], *, on_new_weights: OnNewWeights) -> None:
        """Copy `staged` weights into the model, as `CachedModel.load` says.

        `reprefill` recomputes every cached prefix before it returns; otherwise caches stay.

        Raises:
            ValueError: Names or shapes do not fit the model; nothing was changed.
        """
        self._model.load(version, staged)
        self.version = version
        if on_new_weights == "reprefill":
            cached = [sequence for sequence in self._sequences.values() if sequence.cached]
            for sequence in cached:
                sequence.cached = 0
            self._prefill(cached, bounded=False)

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
        """Cache up to `width` pending tokens of each."""
        chunks = [s.tokens[s.cached : s.cached + min(s.pending, width)] for s in group]
        self._model.prefill(chunks, slots=[s.slot for s in group], starts=[s.cached for s in group])
        for sequence, chunk in zip(group, chunks, strict=True):
            sequence.cached += len(chunk)
            self.prefill_tokens += len(chunk)

    def _arrange(self) -> DecodeBatch:
        """Make the batch of all sequences that are prefilled and have a limit left."""
        held = self._sequences.values()
        plan = plan_slots([s for s in held if s.ready], [s for s in held if not s.ready], num_slots=self.num_slots)
        self._move(plan.slots)
        decoding = sorted((s for s in held if s.ready), key=lambda s: s.slot)
        return DecodeBatch.of(decoding, plan.groups, device=self._model.device)

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
            self._model.move(sources=sources, targets=rows, length=max(lengths))

    def _decode(self, batch: DecodeBatch) -> tuple[list[int], list[float]]:
        """Feed each sequence's last token and sample the next; `batch` is moved on by one position."""
        tokens, logprobs = sample(
            self._model.decode(batch),
            temperatures=batch.temperatures,
            greedy=batch.greedy,
            top_p=batch.top_p,
            excluded=batch.excluded,
            generator=self._generator,
        )
        batch.advance(tokens)
        return tokens.tolist(), logprobs.tolist()

    def _advance(
        self,
        sequences: list[HeldSequence],
        tokens: list[int],
        logprobs: list[float],
        experts: npt.NDArray[np.unsignedinteger[Any]] | None,
    ) -> list[Output]:
        outputs = []
        for row, (sequence, token, logprob) in enumerate(zip(sequences, tokens, logprobs, strict=True)):
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
            columns = None if experts is None else {EXPERTS: [experts[row]]}
            outputs.append(Output(id=sequence.id, tokens=(token,), logprobs=(logprob,), stop=stop, columns=columns))
        return outputs
